"""The one error every fault of a run folder ends in."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run folder, checkpoint or cache that cannot be written or trusted.

    The message names the file, what is wrong with it and what to do about it.
    """
