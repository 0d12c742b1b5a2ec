"""The check of past changes: of restored tasks, from the time before they were archived."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import PastChangeRow
from openclaw_store.domain import ENTITY_NAMES, ChangeKind, Task, TaskStatus
from openclaw_store.maintenance.domains import suspicious_value
from openclaw_store.maintenance.findings import MOST, Findings
from openclaw_store.maintenance.text_checks import undecodable


async def check_past_changes(session: AsyncSession, findings: Findings, now: datetime) -> None:
    """Check past changes like the feed, since `history` returns both alike."""
    row: Any = PastChangeRow
    columns, dialect = row.__table__.c, session.get_bind().dialect.name
    odd = or_(
        *(suspicious_value(column, dialect, now) for column in columns),
        row.item != ENTITY_NAMES[Task],
        row.kind.not_in([str(kind) for kind in ChangeKind]),
        *(
            status.not_in([str(one) for one in TaskStatus])
            for status in (row.from_status, row.to_status)
        ),
        row.previous >= row.revision,
    )
    # By their revisions: the identifier of a damaged row may be unreadable itself.
    revisions = {*(await session.scalars(select(row.revision).where(odd).limit(MOST)))}
    if dialect == "sqlite":
        texts = [columns.item_id, columns.reason, columns.node]
        revisions.update(await undecodable(session, row.revision, texts))
    for revision in sorted(revisions, key=str):
        text = f"Past change {revision} of a restored task has a value that no change has."
        findings.add("feed", text, advice="correct or delete its row of past_changes")
    count = await session.scalar(select(func.count()).select_from(row))
    findings.count(count or 0, "feed")
