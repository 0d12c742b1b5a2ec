"""The row of a run in `RESULTS.md`."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

from campaigns.harness.campaign import Campaign, Run

COLUMNS = (
    "campaign", "database", "date", "commit", "rounds", "seed", "operations", "acknowledged",
    "refused", "lost", "unknown", "… committed", "wrong", "further figures", "time",
)  # fmt: skip
"""Columns of the table at the end of `RESULTS.md`."""


def row(campaign: Campaign, run: Run, seconds: float) -> str:
    """Format a run as a row of the table."""
    counts = run.counts
    numbers = (
        counts.operations, counts.acknowledged, counts.refused, counts.lost, counts.unknown,
        counts.unknown_committed, counts.wrong,
    )  # fmt: skip
    cells = [
        campaign.name,
        run.kind,
        f"{datetime.now(UTC):%Y-%m-%d}",
        commit(),
        f"{run.completed:,} {campaign.unit}",
        str(run.seed),
        *(f"{number:,}" for number in numbers),
        ", ".join(f"{name} {value}" for name, value in run.notes.items()),
        f"{seconds:,.0f} s",
    ]
    return f"| {' | '.join(cells)} |\n"


def record(file: Path, line: str) -> None:
    """Append a row to the table at the end of a file, and create the file if it is missing."""
    if not file.exists():
        dashes = " | ".join("---" for _ in COLUMNS)
        file.write_text(f"| {' | '.join(COLUMNS)} |\n| {dashes} |\n", encoding="utf-8")
    with file.open("a", encoding="utf-8") as table:
        table.write(line)


def commit() -> str:
    """Return the commit of this checkout, with a `+` if files differ from it."""
    git = ("git", "describe", "--always", "--dirty=+", "--exclude=*")
    ran = subprocess.run(
        git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return ran.stdout.strip() or "unknown"
