"""Proofs and races in a process of their own: ``python -m stackwise.kernels.examiner``.

A variant that reads out of bounds poisons the CUDA context of its process, one that waits for a
barrier never returns: so variants run in a child (:func:`serve`) that :class:`Examiner` starts,
watches and replaces. Tasks and answers are lines of JSON:

    {"mode": "prove", "op", "variant", "device", "dtypes", "cases", "seconds"}   -> "finding"
    {"mode": "race", "op", "variant", "device", "dtypes", "seconds"}             -> "contest"

one per case, those that "cases" names or all,
then {"event": "done", "complete": all cases were reached} or {"event": "failed", "reason"}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

COMMAND = (sys.executable, "-m", __name__ if __name__ != "__main__" else __spec__.name)

Event = dict[str, Any]


class Examiner:
    """The parent's side: one child at a time, started when the first task comes.

    ``command`` starts a child that calls :func:`serve`; ``environment`` is added to its own.
    """

    def __init__(
        self, command: Sequence[str] = COMMAND, environment: dict[str, str] | None = None
    ) -> None:
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._child: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None:
            self._kill()
        self._errors.close()

    def run(self, task: Event, seconds: float) -> Iterator[Event]:
        """The child's answers. One that dies, or takes longer, gives a last "failed" event."""
        end = time.monotonic() + seconds
        child = self._running()
        assert child.stdin is not None
        last = "before its first case"
        try:
            child.stdin.write(json.dumps(task).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            yield self._death(last)
            return
        while True:
            line = self._line(end)
            if line is None:
                yield self._overdue(seconds, last) if time.monotonic() >= end else self._death(last)
                return
            event: Event = json.loads(line)
            if event["event"] == "starts":
                last = f"in {event['case']} {event['dtype']}"
                continue
            yield event
            if event["event"] == "failed":
                self._kill()
            if event["event"] in ("done", "failed"):
                return

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._errors.seek(0)
            self._errors.truncate()
            self._rest = b""
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=self._environment,
                start_new_session=True,
            )
        return self._child

    def _line(self, end: float) -> bytes | None:
        """The next line of the child; None when it ended or the time is up."""
        assert self._child is not None
        assert self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                chunk = os.read(self._child.stdout.fileno(), 1 << 16)
                if not chunk:
                    return None
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _death(self, last: str) -> Event:
        assert self._child is not None
        code = self._child.wait()
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        said = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        detail = f": {said[-1][:200]}" if said else ""
        return {"event": "failed", "reason": f"crashed ({cause}) {last}{detail}"}

    def _overdue(self, seconds: float, last: str) -> Event:
        self._kill()
        return {"event": "failed", "reason": f"no answer within {seconds:.0f} s, {last}"}

    def _kill(self) -> None:
        assert self._child is not None
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()


def serve() -> None:
    """The child's side: answers the tasks on stdin until it ends.

    After a failure it ends: what a broken kernel leaves behind must not judge the next one. What
    libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(event: Event) -> None:
        answers.write(json.dumps(event) + "\n")

    for line in sys.stdin:
        task = json.loads(line)
        try:
            complete = _TASKS[task["mode"]](task, answer)
        except Exception as error:  # whatever a variant raises is a verdict on it
            text = (str(error).strip() or "no message").splitlines()[0][:300]
            answer({"event": "failed", "reason": f"{type(error).__name__}: {text}"})
            return
        answer({"event": "done", "complete": complete})


def _prove(task: Event, answer: Callable[[Event], None]) -> bool:
    from . import oracle, oracle_cases

    end = time.monotonic() + task["seconds"]
    for case in oracle_cases.proofs(task["op"]):
        if task["cases"] and case.label not in task["cases"]:
            continue
        for dtype in case.dtypes:
            if task["dtypes"] and dtype not in task["dtypes"]:
                continue
            if time.monotonic() > end:
                return False
            answer({"event": "starts", "case": case.label, "dtype": dtype})
            finding = oracle.prove(task["op"], task["variant"], case, dtype, task["device"])
            passed = {"event": "finding", "passed": finding.passed}
            answer(passed | dataclasses.asdict(finding))
    return True


def _race(task: Event, answer: Callable[[Event], None]) -> bool:
    import torch

    from . import oracle, oracle_cases

    end = time.monotonic() + task["seconds"]
    pairs = [
        (case, dtype)
        for case in oracle_cases.races(task["op"])
        for dtype in case.dtypes
        if not task["dtypes"] or dtype in task["dtypes"]
    ]
    for left, (case, dtype) in zip(range(len(pairs), 0, -1), pairs, strict=True):
        seconds = (end - time.monotonic()) / left
        if seconds <= 0:
            return False
        answer({"event": "starts", "case": case.label, "dtype": dtype})
        try:
            contest = oracle.race(
                task["op"], [task["variant"]], case, dtype, task["device"], 0.6 * seconds
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            answer({"event": "too large", "case": case.label, "dtype": dtype})
            continue
        answer({"event": "contest"} | dataclasses.asdict(contest))
    return True


_TASKS: dict[str, Callable[[Event, Callable[[Event], None]], bool]] = {
    "prove": _prove,
    "race": _race,
}


if __name__ == "__main__":
    serve()
