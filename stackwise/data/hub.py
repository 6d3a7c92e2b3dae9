"""The Hugging Face Hub, or the news that it is out of reach, in seconds instead of a minute."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import lru_cache

_CONNECT_SECONDS = 5.0


@lru_cache(maxsize=1)
def hub_reachable() -> bool:
    """Whether the Hub's host accepts a connection; assumed behind a proxy, asked once a process."""
    if {"https", "all"} & set(urllib.request.getproxies()):
        return True
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _told_to_stay_offline() -> bool:
    import huggingface_hub.constants as constants

    return bool(constants.HF_HUB_OFFLINE)


def failure(what: str, error: Exception, without: str) -> str:
    """The message for something from the Hub that cannot be loaded; ``without`` says what else
    there is where there is no network."""
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    message = f"cannot load {what}: {type(error).__name__}: {reason}."
    if _told_to_stay_offline() or not hub_reachable():
        message += (
            f" The Hub cannot be reached from here, it is not in the Hugging Face cache, and there "
            f"is no file or folder of that name. Without a network {without}."
        )
    return message


@contextlib.contextmanager
def offline_when_unreachable() -> Iterator[None]:
    """Within it, Hub libraries go straight to their cache when there is no network.

    Without it each of them retries every file for half a minute, with a warning per attempt.
    """
    import huggingface_hub.constants as constants

    if _told_to_stay_offline() or hub_reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
