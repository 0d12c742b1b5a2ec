"""Rendering: tables for people, JSON for programs.

`rich` is imported by the functions that draw, so `--help` and failing commands start fast.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from openclaw_store.errors import StoreError, printable
from openclaw_store.maintenance.progress import Report

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from openclaw_store.archive.check import ArchivedDay
    from openclaw_store.domain import Change, NodeInfo, Task
    from openclaw_store.maintenance.doctor import Finding
    from openclaw_store.maintenance.summary import Summary
    from openclaw_store.maintenance.verify import Problem, Verification

_WIDEST = 1000
"""Columns of files and pipes, in which no line is broken."""


def one_line(error: StoreError) -> str:
    """Return the message of an error and its notes in one line."""
    notes: Sequence[str] = getattr(error, "__notes__", ())
    return printable(" ".join("; ".join([str(error), *notes]).split()))


def size(count: float) -> str:
    """Format a number of bytes: `1.5 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(moment: datetime | None, now: datetime) -> str:
    """Format the time since a moment: `2 h 5 min`."""
    return "never" if moment is None else duration(now - moment)


def duration(length: timedelta) -> str:
    """Format a duration in its two largest units: `2 h 5 min`."""
    minutes, seconds = divmod(max(0, round(length.total_seconds())), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((position for position, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])


def when(moment: datetime | None) -> str:
    """Format a moment in UTC: `2026-11-25 09:42:57`."""
    return "" if moment is None else moment.replace(tzinfo=None).isoformat(" ", "seconds")


def counted(counts: dict[str, int]) -> str:
    """Format numbers by status: `3: 2 online, 1 offline`."""
    parts = [f"{count:,} {name}" for name, count in counts.items() if count and name != "total"]
    return f"{counts['total']:,}" + (f": {', '.join(parts)}" if parts else "")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Make a table without lines; only its last column wraps."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headers))
    for header in headers:
        made.add_column(header, no_wrap=True, overflow="fold")
    made.columns[-1].no_wrap = False
    for row in rows:
        made.add_row(*(printable("" if cell is None else str(cell)) for cell in row))
    return made


def summary(found: Summary) -> Table:
    """Make the table of a summary."""
    now, oldest, change, heartbeat = found.read_at, "none", "none", "none"
    if waiting := found.oldest_waiting:
        waited = age(waiting.submitted_at, now)
        oldest = f"{waiting.task_id} ({waiting.name}), {waiting.status.value} for {waited}"
    if found.changed_at:
        change = f"revision {found.revision:,}, {age(found.changed_at, now)} ago"
    if found.heartbeat_at:
        heartbeat = f"{age(found.heartbeat_at, now)} ago"
    details = f"{found.dialect}, {size(found.size)}, schema {found.schema}"
    rows = [
        ("database", f"{found.database} ({details})"),
        ("nodes", counted(found.nodes)),
        ("tasks", counted(found.tasks)),
        ("oldest waiting", oldest),
        ("newest change", change),
        ("newest heartbeat", heartbeat),
    ]
    return table(("", ""), rows)


def days(found: Iterable[ArchivedDay]) -> Table:
    """Make a table with one line per day of an archive."""
    headers = ("day", "cluster", "tasks", "files", "size")
    rows = [(one.day, one.cluster, one.tasks, one.files, size(one.bytes)) for one in found]
    return table(headers, rows)


def nodes(found: Iterable[NodeInfo], now: datetime) -> Table:
    """Make a table with one line per node."""
    headers = ("node", "status", "tasks", "cpu", "memory", "disk", "heartbeat", "skills")
    rows = (
        (
            node.node_id,
            node.status.value,
            f"{node.running_tasks}/{node.max_concurrent_tasks}",
            *(f"{x:.0f} %" for x in (node.cpu_usage, node.memory_usage, node.disk_usage)),
            "never" if node.last_heartbeat is None else f"{age(node.last_heartbeat, now)} ago",
            ", ".join(node.available_skills),
        )
        for node in found
    )
    return table(headers, rows)


def tasks(found: Iterable[Task]) -> Table:
    """Make a table with one line per task."""
    headers = ("task", "status", "priority", "submitted (UTC)", "node", "name")
    rows = (
        (
            task.task_id,
            task.status.value,
            task.priority.name.lower(),
            when(task.submitted_at),
            task.assigned_node,
            task.name,
        )
        for task in found
    )
    return table(headers, rows)


def fields(entity: Task | NodeInfo) -> Table:
    """Make a table with one line per field of a task or node, without the empty ones."""
    import orjson

    def text(value: Any) -> str:
        if isinstance(value, datetime):
            return f"{when(value)} UTC"
        if isinstance(value, list | dict):
            return orjson.dumps(value).decode()
        return str(value)

    rows = [
        (name, value.name.lower() if name == "priority" else text(value))
        for name, value in vars(entity).items()
        if value not in (None, "", [], {})
    ]
    return table(("", ""), rows)


def changes(found: Iterable[Change], *, of_one: bool = False) -> Table:
    """Make a table with one line per change; `of_one` leaves out the task or node."""
    headers = ("revision", "time (UTC)", *(() if of_one else ("", "id")), "change")
    rows = (
        (
            change.revision,
            when(change.changed_at),
            *(() if of_one else (change.item, change.item_id)),
            change.effect,
        )
        for change in found
    )
    return table(headers, rows)


def problems(found: Iterable[Problem]) -> Table:
    """Make a table with one line per problem, and one for its advice."""
    rows: list[tuple[str, str, str]] = []
    for problem in found:
        state = "repaired" if problem.is_repaired else "can be repaired" if problem.is_safe else ""
        rows.append((problem.invariant, state, problem.text))
        if problem.advice and not problem.is_repaired:
            rows.append(("", "", f"→ {problem.advice}"))
    return table(("invariant", "", "problem"), rows)


def findings(found: Iterable[Finding]) -> Table:
    """Make a table with one line per finding, and one for its advice."""
    rows: list[tuple[str, str, str]] = []
    for finding in found:
        rows.append((finding.level.value, finding.name, finding.text))
        if finding.advice:
            rows.append(("", "", f"→ {finding.advice}"))
    return table(("", "", ""), rows)


def verdict(found: Verification, *, was_repaired: bool) -> str:
    """Format the result of `verify` in one line; `was_repaired` if it repaired what it could."""
    left = [problem for problem in found.problems if not problem.is_repaired]
    safe = sum(problem.is_safe for problem in left)
    repaired = len(found.problems) - len(left)
    parts = [
        f"{sum(found.checked.values()):,} values were checked",
        "no problem is left" if found else number(len(left) + found.omitted, "problem is", "left"),
        *([number(repaired, "problem was", "repaired")] if repaired else []),
        *([] if found.is_complete else ["the rows were not checked"]),
    ]
    if safe and was_repaired:
        parts.append(f"{safe:,} of them could not be repaired, or are gone: verify again")
    elif safe:
        parts.append(f"verify --repair can repair {safe:,} of them")
    return "; ".join(parts)


def number(count: int, what: str, verb: str = "") -> str:
    """Format a number of things: `1 task was removed`, `2 tasks were removed`."""
    noun, _, auxiliary = what.partition(" ")
    if count != 1:
        noun, auxiliary = f"{noun}s", {"is": "are", "was": "were"}.get(auxiliary, auxiliary)
    return " ".join(filter(None, [f"{count:,}", noun, auxiliary, verb]))


def id_list(ids: Sequence[str]) -> str:
    """Return identifiers, one on each line."""
    return "\n".join(ids)


def as_json(document: Any, *, compact: bool = False) -> str:
    """Format a document as JSON, with tasks and nodes as in `to_dict`."""
    import orjson

    # Without these options, orjson would write dataclasses and times in its own form.
    options = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
    if not compact:
        options |= orjson.OPT_INDENT_2
    text = orjson.dumps(document, _plain, options).decode()
    return "".join(
        letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text
    )


def _escaped(letter: str) -> str:
    """Escape a character in a text of JSON, where it can only be part of a string."""
    return re.sub("(....)", r"\\u\1", letter.encode("utf-16-be").hex())


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def screen() -> Console:
    """Return the console of the standard output; files and pipes get unbroken lines."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = _WIDEST
    return console


def show(*found: RenderableType) -> None:
    """Write tables, and lines of text."""
    console = screen()
    parts = [printable(part) if isinstance(part, str) else part for part in found]
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    # Rich pads the lines of tables to the full width, which is useless in files and pipes.
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    for text in captured.get().splitlines():
        sys.stdout.write(f"{text.rstrip()}\n")


@contextmanager
def progress(text: str) -> Iterator[Report]:
    """Show a progress bar on the error output, if it is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(text, total=None)

        def report(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total or None)

        yield report
