"""One process at a time in a folder; the lock goes with the process, even after kill -9."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from pathlib import Path
from typing import IO

from stackwise.runs.atomic import storage_errors
from stackwise.runs.errors import RunError


class RunLock:
    """An exclusive ``flock`` on ``<folder>/.lock``, which records who holds it.

    ``RunLock(folder).acquire("train")`` raises :class:`RunError` at once when somebody else holds
    it. Usable as a context manager after ``acquire``; released when the process ends, however it
    ends.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / ".lock"
        self._file: IO[str] | None = None

    def acquire(self, purpose: str) -> RunLock:
        import fcntl

        if self._file is not None:
            raise RunError(f"{self.path.parent} is already locked by this object")
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (held until release)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise RunError(
                    f"cannot {purpose} {self.path.parent}: it is in use by {holder}. Wait for it "
                    "to end, or stop it."
                ) from error
            warnings.warn(
                f"{self.path.parent} is on a file system without locks ({error.strerror}); make "
                "sure that no other process uses it",
                stacklevel=2,
            )
        self._file = file
        with storage_errors(self.path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        return self

    def release(self) -> None:
        """Frees the lock; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
