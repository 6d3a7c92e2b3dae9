"""``stackwise bench NAME``: runs a bench, prints its figures, keeps them in results/.

A bench is a module ``benchmarks/bench_<name>.py`` with ``run(options) -> list[Row]``; it checks
that what it times is correct before it times it.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys

from benchmarks.records import Row, results_file, to_json, write_csv


def names() -> list[str]:
    """Benches that exist."""
    files = sorted(pathlib.Path(__file__).parent.glob("bench_*.py"))
    return [file.stem.removeprefix("bench_").replace("_", "-") for file in files]


def parser() -> argparse.ArgumentParser:
    """The command line of ``stackwise bench``."""
    result = argparse.ArgumentParser(prog="stackwise bench", description=__doc__.split("\n", 1)[0])
    result.add_argument("name", nargs="*", help=f"one of: {', '.join(names())}; none: all")
    result.add_argument("--json", action="store_true", help="one JSON object per line")
    result.add_argument("--quick", action="store_true", help="small shapes, few repeats, no file")
    result.add_argument("--peers", action="store_true", help="also run the peers that import")
    result.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the named benches; returns the exit code."""
    options = parser().parse_args(argv)
    strangers = sorted(set(options.name) - set(names()))
    if strangers:
        print(
            f"stackwise bench: no bench named {', '.join(strangers)}; there are: "
            f"{', '.join(names())}",
            file=sys.stderr,
        )
        return 2
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    for name in options.name or names():
        module = importlib.import_module(f"benchmarks.bench_{name.replace('-', '_')}")
        rows = module.run(options)
        _show(rows, options.json)
        if not options.quick:
            write_csv(rows, results_file(name))
    return 0


def _show(rows: list[Row], as_json: bool) -> None:
    for row in rows:
        if as_json:
            print(to_json(row), flush=True)
        else:
            print(
                f"{row.kernel_name:16} {row.kernel_provider:12} {row.kernel_operation_mode:26} "
                f"{row.y_value_50:10.3f} {row.metric_unit} "
                f"[{row.y_value_20:.3f}, {row.y_value_80:.3f}]",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
