"""Processes that die in the middle: by SIGKILL after a delay, or at the n-th storage operation."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["stackwise.runs", "stackwise.training.activation_cache"])
_OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def kill_after(delay: float, work: Callable[..., None], *args: Any) -> None:
    """Runs ``work(ready, *args)`` and kills it ``delay`` seconds after ``ready.set()``."""
    ready = _CONTEXT.Event()
    process = _CONTEXT.Process(target=work, args=(ready, *args))
    process.start()
    assert ready.wait(60), "the process never got ready"
    time.sleep(delay)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def die_at(operation: int, work: Callable[..., None], *args: Any) -> bool:
    """Runs ``work(*args)`` in a process that ends, uncleaned, right before a storage operation.

    Operations (fsync, rename, ...) count from 0. False when ``work`` finished before that one.
    """
    process = _CONTEXT.Process(target=_die_at, args=(operation, work, args))
    process.start()
    process.join()
    assert process.exitcode in (0, 99), f"exit code {process.exitcode}"
    return process.exitcode == 99


def run_apart(work: Callable[..., None], *args: Any) -> int | None:
    """Runs ``work(*args)`` in another process and returns its exit code."""
    process = _CONTEXT.Process(target=work, args=args)
    process.start()
    process.join()
    return process.exitcode


def _die_at(operation: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    left = [operation]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os._exit(99)
            left[0] -= 1
            return original(*args, **kwargs)

        return call

    for name in _OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    work(*args)
