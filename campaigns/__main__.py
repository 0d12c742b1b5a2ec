"""The command line: `python -m campaigns --help`."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from campaigns.faults.planted_bugs import BUGS
from campaigns.harness.campaign import DATABASE_KINDS, POSTGRESQL, Campaign, Run
from campaigns.harness.results import record, row
from campaigns.scenarios.catalogue import CAMPAIGNS
from devtools.postgres import Server, is_installed, running_server


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        1 if anything was lost or wrong (with `--bug`: if the bug was not found), 3 if nothing ran,
        130 after Ctrl-C or SIGTERM, else 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    if not options.names:
        console.print(_listed())
        return 0
    by_name = {campaign.name: campaign for campaign in CAMPAIGNS}
    names = list(by_name) if options.names == ["all"] else options.names
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"no campaign {unknown[0]!r}: choose from all, {', '.join(by_name)}")
    if options.bug and options.report:
        parser.error("a run with a planted bug is no result: remove --report")
    for name in names:
        if options.database not in (None, *by_name[name].kinds) and options.names != ["all"]:
            parser.error(f"{name} is for {' and '.join(by_name[name].kinds)} alone")
    for name in names if options.bug else ():
        if options.bug not in (known := {**by_name[name].bugs, **by_name[name].slow_bugs}):
            parser.error(f"{name} cannot find {options.bug}, but {', '.join(known) or 'no bug'}")
    good: list[bool] = []
    for campaign in map(by_name.__getitem__, names):
        for kind in campaign.kinds:
            if options.database in (None, kind):
                unavailable_reason = campaign.unavailable_reason() or _no_server(kind)
                if unavailable_reason:
                    console.print(f"{campaign.name} on {kind} did not run: {unavailable_reason}")
                else:
                    try:
                        good.append(_run(campaign, kind, options, console))
                    except KeyboardInterrupt:
                        return 130
    if not good:
        return 3
    return 0 if all(good) else 1


def _run(campaign: Campaign, kind: str, options: argparse.Namespace, console: Console) -> bool:
    """Run a campaign on a kind of database, print and record the result; true if it is good."""
    rounds = options.rounds or campaign.rounds_on(kind)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    console.print(f"[bold]{campaign.name}[/] on {kind}, {rounds:,} {campaign.unit}, seed {seed}")
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(campaign.unit), TimeElapsedColumn())
    began = time.monotonic()
    with (
        TemporaryDirectory(prefix="openclaw-store-", dir=options.folder) as folder,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        _server_for(kind, options.folder) as server,
    ):
        bar = progress.add_task("", total=rounds)

        def report(done: int) -> None:
            progress.update(bar, completed=done)

        run = Run(
            kind,
            rounds,
            Path(folder),
            seed=seed,
            server=server,
            bug=options.bug,
            is_quick=campaign.is_quick(kind, rounds),
            report=report,
        )
        is_whole = True
        try:
            campaign.run(run)
        except KeyboardInterrupt:  # the finished rounds count
            is_whole = False
    seconds = time.monotonic() - began
    for finding in run.findings:
        console.print(finding, markup=False, style="red")
    figures = ", ".join(
        f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in run.figures().items()
    )
    if options.bug:
        is_good, verdicts = campaign.has_found_bug(run), ("bug found", "bug NOT FOUND")
    else:
        is_good, verdicts = run.is_clean, ("clean", "BROKEN")
    verdict = f"[green]{verdicts[0]}[/]" if is_good else f"[red]{verdicts[1]}[/]"
    console.print(f"{verdict}: {figures}; {seconds:.1f} s")
    if options.report:
        record(options.report, row(campaign, run, seconds))
    if not is_whole:
        raise KeyboardInterrupt
    return is_good


@contextmanager
def _server_for(kind: str, folder: Path | None) -> Iterator[Server | None]:
    if kind == POSTGRESQL:
        with running_server(folder) as server:
            yield server
    else:
        yield None


def _no_server(kind: str) -> str | None:
    if kind == POSTGRESQL and not is_installed():
        return "no PostgreSQL: pip install 'openclaw-store[bench]'"
    return None


def _listed() -> Table:
    table = Table("campaign", "fault", "promises", "databases", "rounds")
    for campaign in CAMPAIGNS:
        rounds = " / ".join(
            f"{number:,}" for number in dict.fromkeys(map(campaign.rounds_on, campaign.kinds))
        )
        table.add_row(
            campaign.name,
            campaign.title,
            ", ".join(campaign.promises),
            ", ".join(campaign.kinds),
            f"{rounds} {campaign.unit}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m campaigns",
        description="Check the promises of the store under faults. Without NAME: list them.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="name of a campaign, or `all`")
    parser.add_argument(
        "--rounds",
        type=_positive,
        metavar="N",
        help="default: as listed; short runs judge no times",
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="seed of all random choices; default: a new one"
    )
    parser.add_argument(
        "--database", choices=DATABASE_KINDS, help="default: each that the campaign supports"
    )
    parser.add_argument(
        "--bug", choices=sorted(BUGS), help="plant a bug, which the campaign must find"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="append a row for each run")
    parser.add_argument(
        "--folder", type=Path, help="folder for files; default: the system's temporary folder"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have set them to be ignored
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
