"""What every Triton kernel becomes on each architecture: ``python -m benchmarks.machine_code``.

Compiles, without a GPU, each configuration whose source or launch has changed since it was last
recorded (``--all``: each one), rewrites results/machine_code.csv, and fails on spills, on too much
shared memory and on a missing planned instruction.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stackwise.kernels.triton_ops import machine_code

FILE = Path(__file__).parent / "results" / "machine_code.csv"

Record = dict[str, Any]


def read_records(file: Path = FILE) -> dict[str, Record]:
    """The recorded rows by digest, every value a string; empty without the file."""
    if not file.is_file():
        return {}
    with file.open(newline="") as handle:
        return {row["digest"]: row for row in csv.DictReader(handle)}


def write_records(records: Iterable[Record], file: Path = FILE) -> None:
    """Replaces ``file``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, machine_code.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def inspect_all(
    cases: Sequence[machine_code.Case], processes: int = 1
) -> Iterable[machine_code.Report]:
    """Reports of ``cases``, in their order."""
    if processes == 1:
        yield from map(machine_code.inspect, cases)
        return
    # A case holds a kernel, which does not travel between processes; its digest does.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_inspect_digest, [case.digest for case in cases], chunksize=8)


def main(argv: list[str] | None = None) -> int:
    """Updates the record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--all", action="store_true", help="compile unchanged ones too")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(argv)
    cases = list(machine_code.cases())
    recorded = {} if options.all else read_records()
    changed = [case for case in cases if case.digest not in recorded]
    found = []
    for done, report in enumerate(inspect_all(changed, options.processes), 1):
        recorded[report.digest] = machine_code.as_record(report)
        found += machine_code.faults(report)
        if done % 50 == 0 or done == len(changed):
            write_records(recorded[c.digest] for c in cases if c.digest in recorded)
            print(f"{done} of {len(changed)}", flush=True)
    print(*found, f"{len(changed)} compiled, {len(cases)} recorded in {FILE}", sep="\n")
    return 1 if found else 0


_by_digest: dict[str, machine_code.Case] = {}


def _inspect_digest(digest: str) -> machine_code.Report:
    if not _by_digest:
        _by_digest.update({case.digest: case for case in machine_code.cases()})
    return machine_code.inspect(_by_digest[digest])


if __name__ == "__main__":
    sys.exit(main())
