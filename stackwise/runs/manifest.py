"""manifest.json: the size and SHA-256 of every file beside it, and a digest of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stackwise.runs.errors import RunError

MANIFEST = "manifest.json"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: str | Path, facts: Mapping[str, Any], known: Mapping[str, str] | None = None
) -> None:
    """Records ``facts`` and every file of ``folder``; hashes in ``known`` are not recomputed."""
    folder = Path(folder)
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": (known or {}).get(path.name) or file_sha256(path),
        }
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    content = {**facts, "files": files}
    text = json.dumps({**content, "digest": _digest(content)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of ``folder``; :class:`RunError` when it is missing, truncated or altered."""
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
        intact = digest == _digest(content) and isinstance(content["files"], dict)
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged: not a readable manifest") from error
    if not intact:
        raise RunError(f"{path} is damaged: its content does not match its digest")
    return content


def verify(folder: str | Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Checks the named files (all by default) against the manifest, which is returned.

    Raises :class:`RunError` that names the first file that is missing, truncated or altered.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in manifest["files"] if names is None else names:
        path = folder / name
        if name not in manifest["files"]:
            raise RunError(f"{path} is not listed in {folder / MANIFEST}")
        expected = manifest["files"][name]
        if not path.is_file():
            raise RunError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise RunError(f"{path} is damaged: {size} bytes, {expected['size']} were written")
        if file_sha256(path) != expected["sha256"]:
            raise RunError(f"{path} is damaged: its SHA-256 is not the one recorded")
    return manifest
