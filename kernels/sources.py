"""Fingerprints of the sources behind a variant: a verdict speaks for the code it was made with.

Comments, docstrings and blank lines do not count. A Triton variant is its module and what that
imports inside ``kernels``; a CUDA variant also csrc/ (in an installation without it, the library).
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from functools import cache
from pathlib import Path

from . import _cuda, dispatch

PACKAGE = Path(__file__).resolve().parent
CSRC = PACKAGE.parent / "csrc"

# Imported by the variants, but deciding nothing of what they compute.
_NEUTRAL = {"dispatch.py", "checks.py", "triton_ops/machine_code.py", "triton_ops/registration.py"}


def fingerprint(op: str, variant: str) -> str:
    """16 hexadecimal digits; for "cuda" followed by "+csrc:" or "+library:" and 16 more."""
    registered = dispatch.variant(op, variant)
    module = registered.source or registered.function.__module__.partition(".kernels.")[2]
    text = _python(module)
    return f"{text}+{_native()}" if variant == "cuda" else text


def same_sources(recorded: str, current: str) -> bool:
    """Whether they are of the same sources, as far as this installation can tell.

    Without csrc/, evidence that came with the package is compared in its Python part only.
    """
    if "+library:" in current and "+csrc:" in recorded:
        return recorded.partition("+")[0] == current.partition("+")[0]
    return recorded == current


@cache
def _python(module: str) -> str:
    file = PACKAGE / f"{module.replace('.', '/')}.py"
    digest = hashlib.sha256()
    for name in sorted(_closure(file)):
        digest.update(f"{name}\n{code_of((PACKAGE / name).read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def _closure(file: Path) -> set[str]:
    """Files of this package that ``file`` imports, directly or not, and itself."""
    found: set[str] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        name = current.relative_to(PACKAGE).as_posix()
        if name in found or name in _NEUTRAL or not current.is_file():
            continue
        found.add(name)
        for node in ast.walk(ast.parse(current.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = current.parents[node.level - 1]
                base = folder.joinpath(*(node.module or "").split("."))
                waiting += [base.with_suffix(".py")] if node.module else []
                waiting += [base / f"{alias.name}.py" for alias in node.names]
    return found


def code_of(source: str) -> str:
    """``source`` without comments, docstrings and blank lines, whatever the Python version."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            for row in range(text.lineno, (text.end_lineno or text.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


@cache
def _native() -> str:
    kind, files = "csrc", sorted([*CSRC.glob("*.cu*"), *CSRC.glob("*.h*")])
    if not files:
        kind, files = "library", [f for f in (_cuda.LIBRARY,) if f.is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\n" + file.read_bytes())
    return f"{kind}:{digest.hexdigest()[:16]}"
