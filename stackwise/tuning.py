"""``stackwise tune``: certifies the kernel variants on this GPU, and keeps the verdicts.

Every variant is first proven against the float64 definition on small odd cases, several variants at
a time; those that pass are then raced against "torch", one at a time, on sizes that training runs.
Each runs in a child process, so that a crash or a hang is a verdict and no end. The cases, the
error rule and what counts as faster: ``kernels/oracle.py``; where the verdicts are kept and when
they stop to count: ``kernels/evidence.py``.
"""

from __future__ import annotations

import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from stackwise.kernels import dispatch, oracle_cases
from stackwise.kernels.evidence import VALIDATED, Records
from stackwise.kernels.examiner import COMMAND, Event, Examiner
from stackwise.kernels.oracle import Contest
from stackwise.kernels.sources import fingerprint

Pair = tuple[str, str]  # operation, variant

# Of the time for everything: proofs may take this share, races get what is left.
PROOF_SHARE = 0.6
SECONDS = 55.0
# Cases of a shard: few, so that one operation with many does not keep the last worker busy.
SHARD = 5


@dataclass(frozen=True)
class Settings:
    """What is examined and how.

    ``workers``: proofs at a time. ``command``: starts the examining process. ``progress`` is called
    with (done, all, what) after each step.
    """

    pairs: Sequence[Pair]
    device: str = "cuda"
    seconds: float = SECONDS
    workers: int = 4
    dtypes: Sequence[str] = ("bf16",)
    command: Sequence[str] = COMMAND
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, what: None)


@dataclass(frozen=True)
class Shard:
    """Some cases of one variant in one dtype: what one worker proves at a time."""

    pair: Pair
    dtype: str
    cases: tuple[str, ...]


def candidates(ops: Sequence[str] | None = None) -> list[Pair]:
    """(operation, variant) of everything that may become a default; ValueError for a stranger."""
    known = [op for op in dispatch.available() if op in oracle_cases.operations()]
    strangers = sorted(set(ops or ()) - set(known))
    if strangers:
        raise ValueError(f"--ops: no such operation: {', '.join(strangers)}; accepted: {known}")
    return [
        (op, variant)
        for op in (ops or known)
        for variant in dispatch.available_names(op)
        if variant not in ("reference", "torch")
    ]


def tune(settings: Settings) -> Records:
    """A record per pair (``kernels/evidence.py`` describes them)."""
    start = time.monotonic()
    records: Records = {}
    proven = []
    for pair, record in prove(settings, PROOF_SHARE * settings.seconds).items():
        records.setdefault(pair[0], {})[pair[1]] = record
        if record["status"] == VALIDATED:
            proven.append(pair)
    with Examiner(settings.command) as examiner:
        for index, (op, variant) in enumerate(proven):
            remaining = start + settings.seconds - time.monotonic()
            record = records[op][variant]
            seconds = remaining / (len(proven) - index)
            events = race(examiner, settings, (op, variant), seconds, max(remaining, seconds))
            record |= race_of(events, variant)
            settings.progress(index + 1, len(proven), f"{op} ({variant}): {summary(record)}")
    return records


def prove(settings: Settings, seconds: float) -> dict[Pair, dict[str, Any]]:
    """Per pair the record of its proof: "validated", or what is wrong with it."""
    answers = prove_events(settings, seconds)
    return {
        pair: {"fingerprint": fingerprint(*pair), **proof_of(answers[pair])}
        for pair in settings.pairs
    }


def prove_events(settings: Settings, seconds: float) -> dict[Pair, dict[Shard, list[Event]]]:
    """The answers to every shard; none for those that the time did not reach."""
    deadline = time.monotonic() + seconds
    todo = shards(settings)
    answers: dict[Pair, dict[Shard, list[Event]]] = {pair: {} for pair in settings.pairs}
    for shard in todo:
        answers[shard.pair][shard] = []
    waiting: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    for shard in todo:
        waiting.put(shard)
    lock, finished = threading.Lock(), itertools.count(1)

    def work() -> None:
        with Examiner(settings.command) as examiner:
            while True:
                try:
                    shard = waiting.get_nowait()
                except queue.Empty:
                    return
                left = deadline - time.monotonic()
                events = _prove_shard(examiner, settings, shard, left) if left > 0 else []
                with lock:
                    answers[shard.pair][shard] = events
                    name = f"{shard.pair[0]} ({shard.pair[1]}) {shard.dtype}"
                    settings.progress(next(finished), len(todo), name)

    workers = max(1, min(settings.workers, len(todo)))
    with ThreadPoolExecutor(workers) as pool:
        for part in [pool.submit(work) for _ in range(workers)]:
            part.result()
    return answers


def shards(settings: Settings) -> list[Shard]:
    """All of the work, dtype by dtype, every operation's first cases before any one's last."""
    found: list[tuple[int, int, Shard]] = []
    for order, dtype in enumerate(settings.dtypes):
        for pair in settings.pairs:
            labels = [c.label for c in oracle_cases.proofs(pair[0]) if dtype in c.dtypes]
            for turn, first in enumerate(range(0, len(labels), SHARD)):
                shard = Shard(pair, dtype, tuple(labels[first : first + SHARD]))
                found.append((order, turn, shard))
    return [shard for *_, shard in sorted(found, key=lambda entry: entry[:2])]


def _prove_shard(
    examiner: Examiner, settings: Settings, shard: Shard, seconds: float
) -> list[Event]:
    task = {
        "mode": "prove",
        "op": shard.pair[0],
        "variant": shard.pair[1],
        "device": settings.device,
        "dtypes": [shard.dtype],
        "cases": list(shard.cases),
        "seconds": seconds,
    }
    # A case that began in time may end a little later; a hang may not.
    return list(examiner.run(task, seconds + 5))


def proof_of(answers: Mapping[Shard, Sequence[Event]]) -> dict[str, Any]:
    """Status, dtypes, number of cases and largest error / bound from the answers to a proof.

    ``dtypes``: those in which every case was reached and passed.
    """
    findings = [e for events in answers.values() for e in events if e["event"] == "finding"]
    covered = [finding for finding in findings if not finding["skipped"]]
    figures: dict[str, Any] = {
        "cases": len(covered),
        "worst_error": max((float(e["error"]) for e in covered), default=0.0),
        "dtypes": [],
    }
    wrong = [_what_is_wrong(finding) for finding in covered if not finding["passed"]]
    ends = {shard: events[-1] if events else None for shard, events in answers.items()}
    wrong += [e["reason"] for e in ends.values() if e is not None and e["event"] == "failed"]
    if wrong:
        return figures | {"status": f"failed: {wrong[0]}"}
    missed = {s.dtype for s, end in ends.items() if end is None or not end["complete"]}
    proven = {finding["dtype"] for finding in covered} - missed
    figures["dtypes"] = sorted(proven)
    if proven:
        return figures | {"status": VALIDATED}
    return figures | {"status": "not reached" if missed else "covers no case here"}


def _what_is_wrong(finding: Event) -> str:
    place = f"{finding['case']} {finding['dtype']}"
    if not finding["error"] <= 1.0:
        return f"{place}: {finding['tensor']} has {finding['error']:.3g} times the error it may"
    return f"{place}: two runs differ"


def race(
    examiner: Examiner, settings: Settings, pair: Pair, seconds: float, limit: float
) -> list[Event]:
    """The answers to a race of about ``seconds``; 5 s beyond ``limit`` it counts as hanging."""
    if seconds <= 0:
        return []
    task = {
        "mode": "race",
        "op": pair[0],
        "variant": pair[1],
        "device": settings.device,
        "dtypes": list(settings.dtypes),
        "seconds": seconds,
    }
    return list(examiner.run(task, limit + 5))


def race_of(events: Sequence[Event], variant: str) -> dict[str, Any]:
    """``raced``: cases measured; ``faster``: classes of cases won, with their figures.

    A variant that fails here loses its proof: ``status`` says why.
    """
    contests = [contest_of(event) for event in events if event["event"] == "contest"]
    result: dict[str, Any] = {"raced": len(contests), "faster": wins(contests, variant)}
    if events and events[-1]["event"] == "failed":
        result |= {"status": f"failed: {events[-1]['reason']}", "faster": {}}
    return result


def contest_of(event: Event) -> Contest:
    return Contest(**{name: value for name, value in event.items() if name != "event"})


def wins(contests: Sequence[Contest], variant: str) -> dict[str, dict[str, float]]:
    """Class of cases -> figures of its closest contest, where the variant won all of the class."""
    classes: dict[str, list[Contest]] = {}
    for contest in contests:
        if contest.case_class is not None:
            classes.setdefault(contest.case_class, []).append(contest)
    return {
        key: min((figures_of(c, variant) for c in members), key=lambda f: f["speedup"])
        for key, members in classes.items()
        if all(contest.is_faster(variant) for contest in members)
    }


def figures_of(contest: Contest, variant: str) -> dict[str, float]:
    """Medians in ms, and torch's time over the variant's, of forward with backward."""
    return {
        "speedup": contest.speedup(variant)[1],
        "forward_speedup": contest.speedup(variant, "forward")[1],
        "ms": statistics.median(contest.times[variant]["full"]),
        "torch_ms": statistics.median(contest.times["torch"]["full"]),
    }


def merged(before: Records, now: Records) -> Records:
    """``now`` over ``before``, but a verdict stays where ``now`` did not reach the variant."""
    result = {op: dict(variants) for op, variants in before.items()}
    for op, variants in now.items():
        for name, record in variants.items():
            known = result.setdefault(op, {}).get(name)
            same = known is not None and known["fingerprint"] == record["fingerprint"]
            if not (same and record["status"] == "not reached"):
                result[op][name] = record
    return result


def summary(record: dict[str, Any]) -> str:
    """One line about a record: "validated on 60 cases, faster in 3 of 5 raced (1.2x to 1.9x)"."""
    if record["status"] != VALIDATED:
        return str(record["status"])
    speeds = sorted(figures["speedup"] for figures in record.get("faster", {}).values())
    text = f"validated on {record['cases']} cases"
    if not record.get("raced"):
        return f"{text}, not raced"
    if not speeds:
        return f"{text}, faster in none of {record['raced']} raced"
    between = f"{speeds[0]:.2f}x to {speeds[-1]:.2f}x"
    return f"{text}, faster in {len(speeds)} of {record['raced']} raced ({between})"
