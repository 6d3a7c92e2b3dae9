"""What every Triton kernel becomes on each architecture: ``python -m benchmarks.machine_code``.

Compiles, without a GPU, each configuration whose source or launch has changed since it was last
recorded (``--all``: each one), rewrites results/machine_code.csv, and fails on spills, on too much
shared memory and on a missing planned instruction. What is compiled is kept from time to time, so
that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    """Replaces ``file`` in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, machine_code.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    partial.replace(file)


def to_report(record: Record) -> machine_code.Report:
    """A recorded row with its types."""
    types = {field.name: field.type for field in dataclasses.fields(machine_code.Report)}
    typed = {name: int(v) if types[name] == "int" else v for name, v in record.items()}
    return machine_code.Report(**typed)


def differences(
    cases: Sequence[machine_code.Case], recorded: Mapping[str, Record]
) -> tuple[list[machine_code.Case], list[str]]:
    """Cases that the record lacks, and recorded kernels that no case has any more."""
    current = {case.digest for case in cases}
    gone = [
        f"{row['kernel']} on sm_{row['arch']}" for d, row in recorded.items() if d not in current
    ]
    return [case for case in cases if case.digest not in recorded], gone


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
    parser.add_argument("--check", action="store_true", help="compile nothing: is it up to date?")
    options = parser.parse_args(argv)
    cases = list(machine_code.cases())
    recorded = {} if options.all else read_records()
    changed, gone = differences(cases, recorded)
    if options.check:
        print(f"{FILE}: lacks {len(changed)} of {len(cases)} configurations, "
              f"holds {len(gone)} that are no more")  # fmt: skip
        return 1 if changed or gone else 0
    for done, report in enumerate(inspect_all(changed, options.processes), 1):
        recorded[report.digest] = machine_code.as_record(report)
        if done % 50 == 0:
            write_records(recorded[c.digest] for c in cases if c.digest in recorded)
            print(f"{done} of {len(changed)}", flush=True)
    kept = [recorded[case.digest] for case in cases]
    write_records(kept)
    found = [fault for record in kept for fault in machine_code.faults(to_report(record))]
    print(*found, f"{len(changed)} compiled, {len(cases)} recorded in {FILE}", sep="\n")
    return 1 if found else 0


_by_digest: dict[str, machine_code.Case] = {}


def _inspect_digest(digest: str) -> machine_code.Report:
    if not _by_digest:
        _by_digest.update({case.digest: case for case in machine_code.cases()})
    return machine_code.inspect(_by_digest[digest])


if __name__ == "__main__":
    sys.exit(main())
