"""Runs steps within a time budget, each in its own process, and remembers what is done.

A step that hangs is killed at its limit, one that crashes loses only itself. The state is written
after every step, so that a killed run goes on where it stopped; it holds for one set of sources.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Exit codes of a step that this machine cannot run, and of one that has to be run again.
UNAVAILABLE, UNFINISHED = 77, 75

# The open ones are tried again by the next run, after what is new.
FINAL = ("ok", "failed", "crashed", "unavailable")
OPEN = ("not reached", "unfinished", "interrupted", "timed out")


@dataclass(frozen=True)
class Step:
    """One command. ``limit``: seconds after which it is killed; it starts only if a budget of
    ``least`` seconds is left. ``value`` / ``limit`` decides the order, ``first`` goes before all.
    ``after``: a step without whose success this one is pointless.
    """

    name: str
    command: Sequence[str]
    limit: float
    value: float
    least: float = 10.0
    first: bool = False
    after: str | None = None


@dataclass
class State:
    """What is done, in OUT/state.json: per step status, seconds, exit code, attempts."""

    file: pathlib.Path
    key: str
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: pathlib.Path, key: str) -> State:
        """The state of an earlier run with the same sources, or an empty one."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            steps = dict(content["steps"]) if content["key"] == key else {}
        except (OSError, ValueError, KeyError, TypeError):
            steps = {}
        return cls(file, key, steps)

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({"key": self.key, "steps": self.steps}, indent=1))
        os.replace(partial, self.file)

    def status(self, name: str) -> str:
        return str(self.steps.get(name, {}).get("status", "not reached"))


def order(steps: Sequence[Step], state: State) -> list[Step]:
    """By value per second; what was tried before without an end comes last."""
    return sorted(
        steps,
        key=lambda step: (
            not step.first,
            state.steps.get(step.name, {}).get("attempts", 0),
            -step.value / step.limit,
        ),
    )


def run(
    steps: Sequence[Step],
    state: State,
    budget: float,
    environment: Mapping[str, str],
    say: Callable[[str], None] = print,
) -> None:
    """Runs what is not done yet, as far as ``budget`` seconds reach. Ctrl-C ends it, saved."""
    end = time.monotonic() + budget
    waiting = [step for step in order(steps, state) if state.status(step.name) not in FINAL]
    while waiting:
        ready = [s for s in waiting if s.after is None or state.status(s.after) in FINAL]
        left = end - time.monotonic()
        step = next((s for s in ready if s.least <= left), None)
        if step is None:
            return
        waiting.remove(step)
        if step.after is not None and state.status(step.after) != "ok":
            continue
        limit = min(step.limit, left)
        say(f"[{budget - left:4.0f} s] {step.name} ...")
        attempts = state.steps.get(step.name, {}).get("attempts", 0) + 1
        state.steps[step.name] = {"status": "interrupted", "attempts": attempts}
        state.save()
        result = execute(step, limit, environment, state.file.parent / "logs")
        if result["status"] == "timed out" and limit < step.limit:
            result["status"] = "interrupted"
        state.steps[step.name] = result | {"attempts": attempts}
        state.save()
        say(f"         {result['status']}, {result['seconds']:.0f} s: {result['last'][:110]}")


def execute(
    step: Step, limit: float, environment: Mapping[str, str], logs: pathlib.Path
) -> dict[str, Any]:
    """Status, seconds, exit code and last line of a step; its output goes to logs/<name>.log."""
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / f"{step.name.replace(' ', '-').replace('/', '-')}.log"
    start = time.monotonic()
    with file.open("wb") as log:
        child = subprocess.Popen(
            list(step.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
    return {
        "status": _status(code),
        "seconds": time.monotonic() - start,
        "code": code,
        "last": _last_line(file),
    }


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the step, grandchildren included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _status(code: int | None) -> str:
    if code is None:
        return "timed out"
    if code < 0:
        return "crashed"
    named = {0: "ok", UNAVAILABLE: "unavailable", UNFINISHED: "unfinished"}
    return named.get(code, "failed")


def _last_line(file: pathlib.Path) -> str:
    lines = file.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def not_reached(steps: Sequence[Step], state: State) -> list[str]:
    """Names of the steps that a next run would take up."""
    return [
        step.name
        for step in order(steps, state)
        if state.status(step.name) not in FINAL
        and (step.after is None or state.status(step.after) in ("ok", *OPEN))
    ]
