"""Arrays of many holders on disk, to be read side by side; gone with the process."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.errors import StoreError
from tensors.errors import AveragingError


class Spool:
    """A file without a name in ``folder``, of at most ``limit`` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._size = 0
        self._places: dict[str, list[int]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 see finalize
        except OSError as exc:
            raise self._trouble(exc) from exc
        weakref.finalize(self, self._file.close)  # also of a round that is given up

    def write(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add the arrays of one holder; those of a name are of one type and shape.

        Raises:
            AveragingError: they would take more room than there is to be; nothing was added.
            StoreError: the disk does not take them.
        """
        more = sum(values.nbytes for values in arrays.values())
        if self._size + more > self._limit:
            raise AveragingError(
                f"there are {self._limit / 1e9:.1f} GB for a round's contributions, which are "
                "full: raise contributions_bytes"
            )
        try:
            self._file.seek(self._size)
            for name, values in arrays.items():
                self._file.write(np.ascontiguousarray(values).data)
                self._places.setdefault(name, []).append(self._size)
                self._dtypes[name] = values.dtype
                self._size += values.nbytes
        except OSError as exc:
            raise self._trouble(exc) from exc

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """``(holders, stop − start)``: these values of a tensor, flat, by every holder of it."""
        dtype = self._dtypes[name]
        rows = np.empty((len(self._places[name]), stop - start), dtype)
        try:
            for row, place in zip(rows, self._places[name], strict=True):
                self._file.seek(place + start * dtype.itemsize)
                self._file.readinto(row.data)
        except OSError as exc:
            raise self._trouble(exc) from exc
        return rows

    def close(self) -> None:
        """Give the disk its room back."""
        self._file.close()

    def _trouble(self, exc: OSError) -> StoreError:
        return StoreError(
            f"cannot keep a round's contributions in {self._folder}: {exc.strerror or exc}; free "
            "space or choose another folder, then start again: the run resumes from its last "
            "closed round"
        )
