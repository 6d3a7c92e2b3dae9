"""The page and the archive that ``make gpu-check`` ends with."""

from __future__ import annotations

import json
import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu_check_runner import OPEN, State, Step, not_reached

ARCHIVE = "gpu-check.tar.gz"
LONGEST = 40  # lines of one table, so that the page stays one


def summary(
    steps: Sequence[Step], state: State, machine: Mapping[str, str], records: Mapping[str, Any]
) -> str:
    """Markdown: machine, variants with their verdicts, steps with their ends, what is left."""
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["## Variants", "", *_variant_table(records), ""]
    ended = [step for step in steps if state.status(step.name) not in OPEN]
    wrong = [step for step in ended if state.status(step.name) in ("failed", "crashed")]
    lines += [f"## Steps: {len(ended)} of {len(steps)} ended, {len(wrong)} failed", ""]
    if wrong:
        rows = [(s.name, state.status(s.name), state.steps[s.name]["last"][:160]) for s in wrong]
        lines += [*_table(("step", "end", "last line"), rows), ""]
    unavailable = [s.name for s in ended if state.status(s.name) == "unavailable"]
    if unavailable:
        lines += [f"Not possible on this machine: {', '.join(unavailable)}.", ""]
    left = not_reached(steps, state)
    lines += [
        f"Not reached ({len(left)}; run it again): {', '.join(left)}." if left else "All reached.",
        "",
    ]
    times = [(s.name, f"{state.steps[s.name]['seconds']:.0f}") for s in ended]
    return "\n".join([*lines, *_table(("step", "seconds"), times), ""])


def _variant_table(records: Mapping[str, Any]) -> list[str]:
    rows = []
    for op, variants in sorted(records.items()):
        for variant, record in sorted(variants.items()):
            speeds = sorted(f["speedup"] for f in record["faster"].values())
            won = f"{len(speeds)}, {speeds[0]:.2f}x to {speeds[-1]:.2f}x" if speeds else "none"
            figures = (f"{record['worst_error']:.2f}", ", ".join(record["dtypes"]), won)
            rows.append((op, variant, record["status"][:120], *figures))
    head = ("operation", "variant", "status", "worst error / bound", "dtypes", "classes won")
    return _table(head, rows) if rows else ["No variant has been proven or refuted yet."]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    if len(lines) > LONGEST:
        lines = [*lines[:LONGEST], "", f"({len(rows) - LONGEST + 2} more in state.json)"]
    return lines


def pack(
    out: pathlib.Path, results: pathlib.Path, evidence: pathlib.Path, page: str
) -> pathlib.Path:
    """OUT/gpu-check.tar.gz: the page, the state, the logs, the results and the evidence."""
    (out / "summary.md").write_text(page, encoding="utf-8")
    partial = out / f".{ARCHIVE}"
    with tarfile.open(partial, "w:gz") as archive:
        for name in ("summary.md", "state.json", "logs"):
            if (out / name).exists():
                archive.add(out / name, f"gpu-check/{name}")
        if results.is_dir():
            archive.add(results, f"gpu-check/results/{results.name}")
        if evidence.is_file():
            archive.add(evidence, "gpu-check/evidence.json")
    partial.replace(out / ARCHIVE)
    return out / ARCHIVE


def read_records(evidence: pathlib.Path, gpu: str) -> dict[str, Any]:
    """The records of ``gpu`` in an evidence file."""
    if not evidence.is_file():
        return {}
    content = json.loads(evidence.read_text(encoding="utf-8"))
    records: dict[str, Any] = content["gpus"].get(gpu, {})
    return records
