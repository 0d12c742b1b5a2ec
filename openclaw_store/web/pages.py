"""The pages: each reads what it shows within bounds, and renders a template."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

from openclaw_store.domain import (
    ASSIGNED,
    FINISHED,
    LIVE,
    Change,
    NodeInfo,
    NodeStatus,
    Progress,
    Task,
    TaskFilter,
    TaskPage,
    TaskStatus,
    TaskType,
)
from openclaw_store.errors import NodeNotFoundError, StoreError, TaskNotFoundError
from openclaw_store.maintenance.doctor import diagnose
from openclaw_store.maintenance.failures import Failures, find_failures
from openclaw_store.maintenance.read_around import ReadAround, on_connection, shown
from openclaw_store.maintenance.statistics import Statistics, merged, read_timings
from openclaw_store.maintenance.stuck import StuckGroup, find_stuck
from openclaw_store.maintenance.summary import (
    Waiting,
    find_oldest,
    read_explanation,
    read_shown_history,
)
from openclaw_store.maintenance.verify import Verification, verify
from openclaw_store.observability.prometheus import CONTENT_TYPE, PrometheusExporter
from openclaw_store.repositories import (
    NodeRepository,
    TaskRepository,
    read_newest_changes,
    read_progress,
)
from openclaw_store.state_manager import StateManager
from openclaw_store.web import charts
from openclaw_store.web.live import Live, Shared
from openclaw_store.web.render import TEMPLATES, View
from openclaw_store.web.security import COOKIE, Sessions, root_of

PAGE_SIZE = 50
"""Rows of a list."""

MAX_NODES = 500
"""Nodes that are listed."""

FEW = 20_000
"""So many pending tasks may be looked at to explain one of them."""

HOUR = timedelta(hours=1)
TIMING_PARTS = 12
SAMPLED, MOST = 40, 500
"""Tasks read for each part of the times, and for each kind of failed or stuck tasks."""

FILTERS = ("status", "type", "node", "user", "skill", "name", "error")
"""The fields of the form above the list of tasks."""

PREFERENCES: Mapping[str, Sequence[str]] = {"theme": ("light", "dark"), "lang": ("en", "zh")}


@dataclass(frozen=True)
class Overview:
    """What the first page shows besides the live numbers."""

    oldest: Waiting | None
    failures: Failures
    stuck: Sequence[StuckGroup]
    times: Statistics


class Pages:
    """The pages of one store."""

    def __init__(
        self,
        state: StateManager,
        live: Live,
        sessions: Sessions | None,
        list_clusters: Any,
        *,
        allow_actions: bool,
    ) -> None:
        self._state = state
        self._database = state.db
        self._live = live
        self._sessions = sessions
        self._list_clusters = list_clusters
        self._allow_actions = allow_actions
        self._read = ReadAround(state.db.read)
        self._overview = Shared(self._read_overview, 2.0)
        self._findings = Shared(partial(diagnose, state.db), 2.0)
        self._verifying: asyncio.Task[Verification] | None = None
        self._exporter: PrometheusExporter | None = None

    async def overview(self, request: Request) -> Response:
        await self._live.start()
        now = self._database.clock()
        found = await self._overview.get()
        return self._page(
            request,
            "overview",
            now=now,
            live=self._live,
            found=found,
            throughput=charts.bars(self._live.intervals(now)),
            waiting=charts.lines(found.times.timings),
        )

    async def _read_overview(self) -> Overview:
        now, sql = self._database.clock(), self._database.statements
        intervals = merged(self._live.intervals(now), TIMING_PARTS)

        def read(connection: Connection) -> Overview:
            return Overview(
                find_oldest(connection, sql),
                find_failures(connection, sql, now - HOUR, most=MOST),
                find_stuck(connection, now, most=MOST),
                read_timings(connection, sql, intervals, now, most=SAMPLED),
            )

        return await self._read(on_connection(read))

    async def tasks(self, request: Request) -> Response:
        given = {name: request.query_params.get(name, "") for name in FILTERS}
        if wanted := request.query_params.get("id", "").strip():
            kind = await self._read(partial(_kind_of, id=wanted))
            kind = next((one.item for one in self._read.left_out if one.id == wanted), kind)
            if kind is not None:
                address = f"{root_of(request)}/{kind}?{urlencode({'id': wanted})}"
                return RedirectResponse(address, 303)
        filter = TaskFilter(
            status=TaskStatus(given["status"]) if given["status"] in set(TaskStatus) else None,
            task_type=TaskType(given["type"]) if given["type"] in set(TaskType) else None,
            node=given["node"] or None,
            user=given["user"] or None,
            skill=given["skill"] or None,
            name_contains=given["name"] or None,
            error_contains=given["error"] or None,
        )
        after = request.query_params.get("after")
        page, progress = await self._list(filter, after)
        query = {name: value for name, value in given.items() if value}
        return self._page(
            request,
            "tasks",
            tasks=page.tasks,
            progress=progress,
            given=given,
            wanted=wanted,
            is_first=after is None,
            first=f"?{urlencode(query)}",
            following=page.after and f"?{urlencode({**query, 'after': page.after})}",
            statuses=TaskStatus,
            types=TaskType,
        )

    async def task(self, request: Request) -> Response:
        id = request.query_params.get("id", "")
        may_explain = self._live.tasks["pending"] <= FEW or "explain" in request.query_params

        async def read(session: AsyncSession) -> tuple[Any, ...]:
            task = await TaskRepository(session).get(id)
            history = await read_shown_history(session, id, Task)
            progress = await read_progress(session, [id])
            why = None
            if may_explain and task is not None and task.status is TaskStatus.PENDING:
                why = await read_explanation(session, id, self._database.clock())
            return task, history, progress.get(id), why

        task, history, progress, why = await self._read(read)
        problem = self._problem_of(id)
        if task is None and not history and not problem:
            raise TaskNotFoundError(id)
        return self._page(
            request,
            "task",
            id=id,
            task=task,
            history=history[-PAGE_SIZE:],
            problem=problem,
            progress=progress,
            why=why,
            can_explain=task is not None and task.status is TaskStatus.PENDING,
            can_cancel=task is not None and task.status in LIVE,
            can_release=task is not None and task.status in ASSIGNED,
            can_requeue=task is not None and task.status in FINISHED,
        )

    async def nodes(self, request: Request) -> Response:
        given = request.query_params.get("status", "")

        async def read(session: AsyncSession) -> list[NodeInfo]:
            repository = NodeRepository(session)
            if given in set(NodeStatus):
                return await repository.list_by_status(NodeStatus(given))
            return await repository.get_all_nodes()

        found = await self._read(read)
        return self._page(
            request,
            "nodes",
            nodes=found[:MAX_NODES],
            omitted=max(0, len(found) - MAX_NODES),
            given=given,
            statuses=NodeStatus,
            now=self._database.clock(),
        )

    async def node(self, request: Request) -> Response:
        id = request.query_params.get("id", "")
        node = await self._read(lambda one: NodeRepository(one).get(id), is_one_statement=True)
        if node is None:
            if problem := self._problem_of(id):
                return await self.refused(request, problem, 200)
            raise NodeNotFoundError(id)
        filter = TaskFilter(node=id, status=tuple(ASSIGNED))
        held, progress = await self._list(filter)
        return self._page(
            request,
            "node",
            node=node,
            held=held,
            progress=progress,
            is_drained=node.status is NodeStatus.MAINTENANCE,
            now=self._database.clock(),
        )

    async def changes(self, request: Request) -> Response:
        await self._live.start()
        before = request.query_params.get("before", "")
        limit = int(before) if before.isdecimal() and len(before) < 19 else None
        until = self._live.revision + 1 if limit is None else limit

        async def read(session: AsyncSession) -> Sequence[Change]:
            return shown(await read_newest_changes(session, until, 2 * PAGE_SIZE))

        found = await self._read(read)
        return self._page(
            request, "changes", changes=found, is_newest=limit is None, live=self._live
        )

    async def health(self, request: Request) -> Response:
        await self._live.start()
        figures = await self._state.db.get_stats() if "figures" in request.query_params else None
        result: Verification | None = None
        problem = ""
        running = self._verifying is not None and not self._verifying.done()
        if self._verifying is not None and not running and not self._verifying.cancelled():
            error = self._verifying.exception()
            problem = str(error or "")
            result = None if error else self._verifying.result()
        return self._page(
            request,
            "health",
            findings=await self._findings.get(),
            writer=figures and figures["writer"],
            is_verifying=running,
            result=result,
            problem=problem,
        )

    async def verify(self, request: Request) -> Response:
        """Start a verification, unless one runs; it only reads."""
        if self._verifying is None or self._verifying.done():
            self._verifying = asyncio.ensure_future(verify(self._database))
        return RedirectResponse(f"{root_of(request)}/health", 303)

    async def clusters(self, request: Request) -> Response:
        found = await self._list_clusters()
        headings = list(dict.fromkeys(name for one in found for name in one))
        return self._page(request, "clusters", clusters=found, headings=headings)

    async def preferences(self, request: Request) -> Response:
        """Store a preference in a cookie, and return to the page before."""
        target = local(request.query_params.get("next", "/"))
        answer = RedirectResponse(root_of(request) + target, 303)
        for name, values in PREFERENCES.items():
            value = request.query_params.get(name, "")
            if value in values:
                path = root_of(request) or "/"
                answer.set_cookie(f"openclaw_store_{name}", value, 31_536_000, path=path)
        return answer

    async def _list(
        self, filter: TaskFilter, after: str | None = None
    ) -> tuple[TaskPage, dict[str, Progress]]:
        """Read a page of tasks, and the progress of the running tasks."""
        page = await self._read(
            lambda one: TaskRepository(one).list_tasks(filter, after=after, limit=PAGE_SIZE)
        )
        ids = [task.task_id for task in page if task.status is TaskStatus.RUNNING]
        if not ids:
            return page, {}
        return page, await self._read(partial(read_progress, ids=ids), is_one_statement=True)

    async def events(self, request: Request) -> Response:
        last = request.headers.get("last-event-id") or request.query_params.get("since", "")
        since = int(last) if last.isdecimal() and len(last) < 19 else self._live.revision
        return StreamingResponse(self._live.events(since), media_type="text/event-stream")

    async def healthz(self, request: Request) -> Response:
        """Tell a supervisor whether the database can be read."""
        try:
            async with asyncio.timeout(5):
                sql = self._database.statements
                await self._read(on_connection(lambda one: find_oldest(one, sql)))
        except (StoreError, TimeoutError):
            return PlainTextResponse("the database cannot be read\n", 503)
        return PlainTextResponse("ok\n")

    async def login(self, request: Request, *, is_wrong: bool) -> Response:
        """Return the form for the token."""
        return self._page(request, "login", 401 if is_wrong else 200, is_wrong=is_wrong)

    async def metrics(self, request: Request) -> Response:
        """Return all metrics for Prometheus; this process is measured from the first call on."""
        if self._exporter is None:
            self._exporter = PrometheusExporter(self._database)
            self._exporter.attach(self._state)
        return Response(await self._exporter.text(), media_type=CONTENT_TYPE)

    async def refused(self, request: Request, text: str, status: int) -> Response:
        """Return the page of an error."""
        return self._page(request, "refused", status, text=text)

    def _page(self, request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        cookie = request.cookies.get(COOKIE, "")
        view = View(
            request,
            name,
            self._live.revision,
            self._sessions.form_secret(cookie) if self._sessions else "",
            can_act=self._allow_actions,
            has_sessions=self._sessions is not None,
            has_clusters=self._list_clusters is not None,
            left_out=self._read.left_out,
        )
        template = TEMPLATES.get_template(f"{name}.html")
        return HTMLResponse(template.render(view=view, _=view.translate, **values), status)

    def _problem_of(self, id: str) -> str:
        """Return the reason why a row cannot be read; empty if it can."""
        return next((one.text for one in self._read.left_out if one.id == id), "")

    async def stop(self) -> None:
        """End a verification that runs."""
        if self._verifying is not None:
            self._verifying.cancel()
            await asyncio.wait([self._verifying])


async def _kind_of(session: AsyncSession, id: str) -> str | None:
    """Return `task` or `node`; `None` for an unknown identifier."""
    if await TaskRepository(session).get(id):
        return "task"
    return "node" if await NodeRepository(session).get(id) else None


def local(target: str) -> str:
    """Return a path of this page; of any other address, the first page."""
    is_local = target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if is_local and target.isprintable() else "/"
