"""How the C library keeps memory, for a process on a machine that has little of it."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
LARGE_BYTES = 1 << 17


def keep_little() -> bool:
    """Have blocks of :data:`LARGE_BYTES` given back to the system when they are freed.

    Tensors come and go in several threads; by its own rules glibc keeps what the largest took, in
    each of them (``mallopt(3)``: its thresholds grow with what is freed). False where the C library
    is another: then nothing changes. To be called before there are threads.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((_MMAP_THRESHOLD, LARGE_BYTES), (_TRIM_THRESHOLD, LARGE_BYTES), (_ARENA_MAX, 2))
    return all(mallopt(key, value) for key, value in wanted)
