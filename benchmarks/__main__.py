"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.catalogue import BENCHMARKS
from benchmarks.measure import Bench
from benchmarks.report import PLOTTED, Machine, Report, Result
from benchmarks.work import make_empty


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, and report it; 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = options.only or [benchmark.name for benchmark in BENCHMARKS]
    if options.plot and PLOTTED not in names:
        parser.error(f"the picture shows {PLOTTED}: add it to --only")
    if options.plot and not find_spec("matplotlib"):
        parser.error("the picture needs matplotlib: pip install 'openclaw-store[bench]'")
    divisor = 10**options.quick
    rounds = options.rounds or (2 if options.quick else 5)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    with TemporaryDirectory(prefix="openclaw-store-", dir=options.folder) as folder:
        report = _run(Path(folder), names, rounds, divisor)
    report.print(console)
    if options.json:
        text = json.dumps(report.as_json(), indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(report.as_markdown(), encoding="utf-8")
    if options.plot:
        report.plot(options.plot)
    return 0


def _run(folder: Path, names: Sequence[str], rounds: int, divisor: int) -> Report:
    machine = Machine.here(folder)
    empty = folder / "empty.db"
    asyncio.run(make_empty(empty))
    results: list[Result] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=len(names))
        for benchmark in BENCHMARKS:
            if benchmark.name not in names:
                continue
            done, name = len(results), benchmark.name

            def report(now: str, share: float, done: int = done, name: str = name) -> None:
                progress.update(bar, description=f"{name}: {now}", completed=done + share)

            bench = Bench(folder, empty, rounds=rounds, divisor=divisor, report=report)
            figures = asyncio.run(benchmark.measure(bench))
            results.append(Result(benchmark, figures, bench.samples))
    return Report(machine, rounds, divisor, results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the store beside other ways to do the same.",
    )
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--quick", action="count", default=0, help="a tenth of the work; twice, a hundredth"
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help="default: 5, quick 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and samples")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw writes per second")
    parser.add_argument(
        "--folder", type=Path, help="where databases are made; default: the system's for such"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
