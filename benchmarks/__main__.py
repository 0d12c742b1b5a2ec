"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.catalogue import BENCHMARKS, GROUPS
from benchmarks.comparison import (
    ROOT,
    Comparison,
    as_table,
    checked_out,
    compare,
    measure_in,
    require_own_library,
)
from benchmarks.measure import Bench, Samples, Skipped
from benchmarks.report import PLOTTED, Machine, Report, Result
from benchmarks.work import connected, make_empty, require_durable_server
from devtools.postgres import Databases, is_installed, running_server

_NO_SERVER = Skipped("no PostgreSQL: pip install 'openclaw-store[bench]'")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and print the figures.

    Returns:
        1 if `--against` cannot measure a commit, else 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    every = [benchmark.name for benchmark in BENCHMARKS]
    chosen = [name for one in options.only or every for name in GROUPS.get(one, [one])]
    names = list(dict.fromkeys(chosen))
    if options.plot and PLOTTED not in names:
        parser.error(f"the plot shows {PLOTTED}: add it to --only")
    if options.plot and not find_spec("matplotlib"):
        parser.error("the plot needs matplotlib: pip install 'openclaw-store[bench]'")
    divisor = 10**options.quick
    rounds = options.rounds or (2 if options.quick else 5)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    if options.against:
        if options.markdown or options.plot:
            parser.error("--against writes --json only: remove --markdown and --plot")
        try:
            comparisons = _compare(options, names, rounds)
        except subprocess.CalledProcessError as error:
            console.print(f"{' '.join(error.cmd)} failed:\n{error.stderr}", markup=False)
            return 1
        console.print(f"Medians of {rounds} rounds in turns; a ratio above 1 is worse now.\n")
        console.print(as_table(comparisons, options.against))
        if options.json:
            _write_json(options.json, [one.as_json() for one in comparisons])
        return 0
    with TemporaryDirectory(prefix="openclaw-store-", dir=options.folder) as folder:
        report = _run(Path(folder), names, rounds, divisor, options.server)
    report.print(console)
    if options.json:
        _write_json(options.json, report.as_json())
    if options.markdown:
        options.markdown.write_text(report.as_markdown(), encoding="utf-8")
    if options.plot:
        report.plot(options.plot)
    return 0


def _compare(options: argparse.Namespace, names: Sequence[str], rounds: int) -> list[Comparison]:
    """Compare the library with that of another commit, on one server for both."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=options.folder)))
        server = None
        if any(benchmark.needs_server and benchmark.name in names for benchmark in BENCHMARKS):
            server = stack.enter_context(_running_server(folder, options.server))
        arguments = ["--quick"] * options.quick + ["--folder", str(folder)]
        if server is not None:
            arguments += ["--server", server.url]
        before = stack.enter_context(checked_out(options.against))
        for checkout in (before, ROOT):
            require_own_library(checkout)

        def measure(checkout: Path, name: str) -> Samples:
            return measure_in(checkout, name, *arguments)

        return compare(before, ROOT, names, rounds, measure)


def _write_json(file: Path, content: object) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _run(
    folder: Path, names: Sequence[str], rounds: int, divisor: int, server_url: str | None
) -> Report:
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in names]
    empty = folder / "empty.db"
    asyncio.run(make_empty(empty))
    results: list[Result] = []
    with ExitStack() as stack:
        server = empty_url = version = None
        if any(benchmark.needs_server for benchmark in chosen):
            server = stack.enter_context(_running_server(folder, server_url))
        if server is not None:
            version = asyncio.run(_version(server.url))
            empty_url = stack.enter_context(_empty_database(server))
        machine = Machine.here(folder, version)
        progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
        )
        bar = progress.add_task("", total=len(chosen))
        for benchmark in chosen:
            if benchmark.needs_server and server is None:
                skipped = [_NO_SERVER] * len(benchmark.lines)
                results.append(Result(benchmark, skipped, {}))
                continue
            done, name = len(results), benchmark.name

            def report(now: str, share: float, done: int = done, name: str = name) -> None:
                progress.update(bar, description=f"{name}: {now}", completed=done + share)

            bench = Bench(
                folder,
                empty,
                server=server,
                empty_url=empty_url,
                rounds=rounds,
                divisor=divisor,
                report=report,
            )
            figures = asyncio.run(benchmark.measure(bench))
            results.append(Result(benchmark, figures, bench.samples))
    return Report(machine, rounds, divisor, results)


@contextmanager
def _running_server(folder: Path, url: str | None) -> Iterator[Databases | None]:
    """Provide the server at `url`, or a new one in `folder`; `None` if none is installed."""
    if url is not None:
        yield Databases(url)
    elif is_installed():
        folder.chmod(0o711)  # as root, the server runs as another user
        with running_server(folder) as server:
            yield server
    else:
        yield None


@contextmanager
def _empty_database(server: Databases) -> Iterator[str]:
    """Provide a migrated database without rows, to be copied."""
    url = asyncio.run(server.create_database())
    try:
        asyncio.run(make_empty(url))
        yield url
    finally:
        asyncio.run(server.drop_database(url))


async def _version(url: str) -> str:
    async with connected(url) as connection:
        await require_durable_server(connection)
        version: str = await connection.fetchval("SHOW server_version")
        return version


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the store beside other libraries.",
    )
    names = [*GROUPS, *(benchmark.name for benchmark in BENCHMARKS)]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--quick", action="count", default=0, help="a tenth of the work; twice, a hundredth"
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help="default: 5, quick 2")
    parser.add_argument(
        "--against",
        metavar="REVISION",
        help="compare the figures of the library with those of another commit",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and samples")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw writes per second")
    parser.add_argument(
        "--folder", type=Path, help="folder for databases; default: the system's temporary folder"
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="PostgreSQL server for databases; default: a new one in the folder",
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
