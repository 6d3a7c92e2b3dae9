"""``stackwise bench [NAME ...]``: runs benches, prints their figures, keeps them in results/.

A bench is a module ``benchmarks/bench_<name>.py`` with ``run(options)`` that gives its rows one
after the other; it checks that what it times is correct before it times it. Rows are written to
``<name>.csv.partial`` as they come and replace ``<name>.csv`` when the bench is through, so a kill
loses nothing and ``--resume`` goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterable

from benchmarks.cases import Options, OutOfTime
from benchmarks.records import (
    Row,
    append_csv,
    make_row,
    read_csv,
    results_file,
    to_json,
    write_csv,
)


def names() -> list[str]:
    """Benches that exist."""
    files = sorted(pathlib.Path(__file__).parent.glob("bench_*.py"))
    return [file.stem.removeprefix("bench_").replace("_", "-") for file in files]


def run_bench(
    name: str, options: Options | None = None, show: Callable[[Row], None] | None = None
) -> list[Row]:
    """Runs one bench and returns its rows, each passed to ``show`` as soon as it is measured.

    ``name`` is one of :func:`names`, with - or _. Unless ``options.quick``, the rows are kept in
    ``options.folder`` or results/<device>; with ``options.resume`` those of an interrupted run are
    among the returned ones. ValueError for an unknown name.
    """
    options = options or Options()
    module_name = name.replace("-", "_")
    if module_name.replace("_", "-") not in names():
        raise ValueError(f"name: got {name!r}; accepted: {', '.join(names())}")
    file = options.folder / f"{module_name}.csv" if options.folder else results_file(module_name)
    partial = file.with_suffix(".csv.partial")
    rows: list[Row] = []
    if not options.quick:
        if options.resume:
            rows, options = _resumed(partial, options)
        else:
            partial.unlink(missing_ok=True)
    module = importlib.import_module(f"benchmarks.bench_{module_name}")
    complete = True
    try:
        for row in module.run(options):
            rows.append(row)
            if show is not None:
                show(row)
            if not options.quick:
                append_csv([row], partial)
    except OutOfTime as rest:
        options.note(f"{name}: out of time, {rest}; --resume measures the rest")
        complete = False
    if not options.quick:
        write_csv(rows, file)
        if complete:
            partial.unlink(missing_ok=True)
    return rows


def _resumed(partial: pathlib.Path, options: Options) -> tuple[list[Row], Options]:
    """The complete cases of an interrupted run of the same code, and options that skip them.

    Its last case may lack rows, so it is measured again.
    """
    here = make_row("", "", "", [0.0], metric=("", ""), x=("", "", 0), extra={})
    same = ("git_sha", "torch_version", "triton_version", "gpu_name")
    found: dict[tuple[str, float], list[Row]] = {}
    for row in read_csv(partial):
        series = json.loads(row.extra_benchmark_config_str).get("series")
        if series is not None and all(getattr(row, key) == getattr(here, key) for key in same):
            found.setdefault((series, row.x_value), []).append(row)
    if found:
        found.popitem()
    rows = [row for case in found.values() for row in case]
    partial.unlink(missing_ok=True)
    append_csv(rows, partial)
    return rows, dataclasses.replace(options, measured=frozenset(found))


def failures(rows: Iterable[Row]) -> list[str]:
    """Our variants that the gate turned down, one line each."""
    return [
        f"{row.kernel_name} {row.kernel_provider} {row.extra_benchmark_config_str}"
        for row in rows
        if row.metric_name == "correctness"
        and row.kernel_provider.startswith("stackwise")
        and not row.y_value_50 <= 1.0
    ]


def parser() -> argparse.ArgumentParser:
    """The command line of ``stackwise bench``."""
    result = argparse.ArgumentParser(prog="stackwise bench", description=__doc__.split("\n", 1)[0])
    result.add_argument(
        "name", nargs="*", help=f"one of: {', '.join(names())} (- or _); none: all of them"
    )
    result.add_argument("--json", action="store_true", help="one JSON object per line")
    result.add_argument("--quick", action="store_true", help="small shapes, few repeats, no file")
    result.add_argument("--peers", action="store_true", help="also run the peers that import")
    result.add_argument("--seconds", type=float, metavar="N", help="time limit of each bench")
    result.add_argument("--resume", action="store_true", help="go on where a kill stopped a bench")
    result.add_argument("--results", type=pathlib.Path, metavar="DIR", help="folder of the files")
    result.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    result.add_argument(
        "--plot",
        action="store_true",
        help="measure nothing: draw docs/benchmarks.md and its pictures from the results files",
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the named benches; returns the exit code, 1 when a variant of ours is not correct."""
    options = parser().parse_args(argv)
    wanted = [name.replace("_", "-") for name in options.name]
    strangers = sorted(set(wanted) - set(names()))
    if strangers:
        print(
            f"stackwise bench: no bench named {', '.join(strangers)}; there are: "
            f"{', '.join(names())}",
            file=sys.stderr,
        )
        return 2
    if options.plot:
        from benchmarks import report

        return report.main()
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    wrong: list[str] = []
    for name in wanted or names():
        rows = run_bench(name, _options(options), functools.partial(_show, as_json=options.json))
        wrong += failures(rows)
    for line in wrong:
        print(f"stackwise bench: not correct: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _options(parsed: argparse.Namespace) -> Options:
    # Nothing but rows on the standard output of --json.
    note = functools.partial(print, file=sys.stderr if parsed.json else sys.stdout, flush=True)
    return Options(
        peers=parsed.peers,
        quick=parsed.quick,
        seconds=parsed.seconds,
        resume=parsed.resume,
        folder=parsed.results,
        note=note,
    )


def _show(row: Row, as_json: bool) -> None:
    if as_json:
        print(to_json(row), flush=True)
        return
    series = json.loads(row.extra_benchmark_config_str).get("series", "")
    print(
        f"{row.kernel_name:16} {series:24} {row.x_name}={row.x_value:<8g} "
        f"{row.kernel_provider:20} {row.kernel_operation_mode:10} {row.metric_name:11} "
        f"{row.y_value_50:10.3f} {row.metric_unit} [{row.y_value_20:.3f}, {row.y_value_80:.3f}]",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
