"""Tests that run Triton's interpreter: only in a process started for them (test_interpreter.py)."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]

if not collect_ignore_glob:
    from tests.triton.interpreter import repair

    repair()
