"""The versions of the parameters that images can be answered with, and which of them serves.

Shared by the training machine, which publishes, and the answering one, which asks: every method may
be called from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.exit_policies import Policies
from tensors.networks import State

log = logging.getLogger("splitfleet.coordinator")


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """The parameters after ``number`` closed rounds; nobody changes them.

    ``trained`` are the cuts whose exit head some device has trained.
    """

    number: int
    state: State
    trained: frozenset[int]
    policies: Policies = field(default_factory=dict)


class Versions:
    """The last ``keep`` versions of a run, the one that serves and the one that was chosen before.

    ``load`` gets a version that is not in memory, None if that cannot be had. ``chosen`` looks up
    which one somebody has chosen to serve, None for that of the last closed round; it may raise
    ``StoreError``.
    """

    def __init__(
        self,
        latest: Version,
        *,
        keep: int,
        load: Callable[[int], Version | None],
        chosen: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.chosen = chosen
        self._lock = threading.Lock()
        self._latest = latest
        self._pinned: Version | None = None
        self._pinned_before: Version | None = None
        """Devices that have not heard of the change yet still ask about it."""
        self._keep = keep
        self._load = load
        self._held: OrderedDict[int, Version] = OrderedDict([(latest.number, latest)])
        self._missing: set[int] = set()
        self.changed: Callable[[], None] = _nothing
        """Called, in the thread that changed it, when another version serves."""

    @property
    def latest(self) -> Version:
        """That of the last closed round."""
        with self._lock:
            return self._latest

    @property
    def serving(self) -> Version:
        """The one that images are to be answered with."""
        with self._lock:
            return self._pinned or self._latest

    @property
    def pinned(self) -> int | None:
        """The number that was chosen by hand; None: the last closed round's serves."""
        with self._lock:
            return None if self._pinned is None else self._pinned.number

    def publish(self, version: Version) -> None:
        """A round has closed with these parameters."""
        with self._lock:
            self._latest = version
            self._missing.clear()
            self._hold(version)
        self.changed()

    def pin(self, number: int | None) -> bool:
        """Serve this version from now on, or with None the last closed round's.

        False, and nothing changes, if there is no such version.
        """
        if number == self.pinned:
            return True
        version = None
        if number is not None:
            version = self._get(number)
            if version is None:
                return False
        with self._lock:
            self._pinned_before, self._pinned = self._pinned, version
        self.changed()
        return True

    def answers(self, number: int) -> bool:
        """Whether features of this version are answered, as far as is known without loading it."""
        with self._lock:
            return self._answers(number)

    def find(self, number: int) -> Version | None:
        """A version whose features are answered; None if there is none, or it cannot be loaded."""
        with self._lock:
            if not self._answers(number):
                return None
        return self._get(number)

    def _answers(self, number: int) -> bool:
        if any(number == pinned.number for pinned in self._pins()):
            return True
        recent = self._latest.number - self._keep < number <= self._latest.number
        return recent and number not in self._missing

    def _get(self, number: int) -> Version | None:
        with self._lock:
            for known in (*self._pins(), self._latest, self._held.get(number)):
                if known is not None and known.number == number:
                    if number in self._held:
                        self._held.move_to_end(number)
                    return known
        version = self._load(number)  # takes a while, so that nobody waits for it
        with self._lock:
            if version is None:
                self._missing.add(number)
            else:
                self._hold(version)
        return version

    def _pins(self) -> list[Version]:
        return [pin for pin in (self._pinned, self._pinned_before) if pin is not None]

    def _hold(self, version: Version) -> None:
        self._held[version.number] = version
        self._held.move_to_end(version.number)
        while len(self._held) > self._keep:
            self._held.popitem(last=False)


def _nothing() -> None:
    pass
