"""Processes that compute for this one: each with one thread, and not longer than this one lives."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def begin() -> None:
    """What a worker of a spawned pool does first."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to speak about
    threading.Thread(target=_end_with_parent, daemon=True).start()


def end_now(pool: ProcessPoolExecutor) -> None:
    """End a pool, and its workers wherever they are: they may be stopped anywhere."""
    for child in multiprocessing.active_children():
        child.terminate()
    pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
