"""The pages: each reads what it shows within bounds, and renders a template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlencode

from sqlalchemy import Connection
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
    NodeStatus,
    TaskFilter,
    TaskStatus,
    TaskType,
)
from openclaw_store.errors import NodeNotFoundError, StoreError, TaskNotFoundError
from openclaw_store.maintenance.doctor import diagnose
from openclaw_store.maintenance.failures import Failures, find_failures
from openclaw_store.maintenance.statistics import (
    Statistics,
    merged,
    read_timings,
)
from openclaw_store.maintenance.stuck import StuckGroup, find_stuck
from openclaw_store.maintenance.summary import Waiting, explain_task, find_oldest
from openclaw_store.maintenance.verify import Verification, verify
from openclaw_store.observability.prometheus import CONTENT_TYPE, PrometheusExporter
from openclaw_store.repositories import read_history, read_newest_changes
from openclaw_store.state_manager import StateManager
from openclaw_store.web import charts
from openclaw_store.web.live import Live, Shared
from openclaw_store.web.render import TEMPLATES, View
from openclaw_store.web.security import COOKIE, Sessions, root_of

Result = TypeVar("Result")

PAGE_SIZE = 50
"""Rows of a list."""

MAX_NODES = 500
"""Nodes that are listed."""

FEW = 20_000
"""So many pending tasks may be looked at to explain one of them."""

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
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
        now = self._database.clock()
        intervals = merged(self._live.intervals(now), TIMING_PARTS)

        def read(connection: Connection) -> Overview:
            return Overview(
                find_oldest(connection),
                find_failures(connection, self._database.statements, now - HOUR, most=MOST),
                find_stuck(connection, now, most=MOST),
                read_timings(connection, intervals, now, most=SAMPLED),
            )

        return await self._read(read)

    async def tasks(self, request: Request) -> Response:
        given = {name: request.query_params.get(name, "") for name in FILTERS}
        if wanted := request.query_params.get("id", "").strip():
            kind = "task" if await self._state.get_task(wanted) else "node"
            if kind == "task" or await self._state.get_node(wanted):
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
        page = await self._state.task_repo.list_tasks(filter, after=after, limit=PAGE_SIZE)
        query = {name: value for name, value in given.items() if value}
        return self._page(
            request,
            "tasks",
            tasks=page.tasks,
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
        task = await self._state.task_repo.get(id)
        history = await self._database.read(partial(read_history, id=id))
        if task is None and not history:
            raise TaskNotFoundError(id)
        why = None
        can_explain = task is not None and task.status is TaskStatus.PENDING
        if can_explain and (
            self._live.tasks["pending"] <= FEW or "explain" in request.query_params
        ):
            why = await explain_task(self._database, id)
        return self._page(
            request,
            "task",
            id=id,
            task=task,
            history=history[-PAGE_SIZE:],
            progress=task and await self._state.get_progress(id),
            why=why,
            can_explain=can_explain,
            can_cancel=task is not None and task.status in LIVE,
            can_release=task is not None and task.status in ASSIGNED,
            can_requeue=task is not None and task.status in FINISHED,
        )

    async def nodes(self, request: Request) -> Response:
        given = request.query_params.get("status", "")
        repository = self._state.node_repo
        found = await (
            repository.list_by_status(NodeStatus(given))
            if given in set(NodeStatus)
            else repository.get_all_nodes()
        )
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
        node = await self._state.node_repo.get(id)
        if node is None:
            raise NodeNotFoundError(id)
        filter = TaskFilter(node=id, status=tuple(ASSIGNED))
        held = await self._state.task_repo.list_tasks(filter, limit=PAGE_SIZE)
        is_drained = node.status is NodeStatus.MAINTENANCE
        return self._page(
            request, "node", node=node, held=held, is_drained=is_drained, now=self._database.clock()
        )

    async def changes(self, request: Request) -> Response:
        await self._live.start()
        before = request.query_params.get("before", "")
        limit = int(before) if before.isdecimal() and len(before) < 19 else None
        until = self._live.revision + 1 if limit is None else limit
        found = await self._database.read(
            partial(read_newest_changes, before=until, count=2 * PAGE_SIZE)
        )
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

    async def events(self, request: Request) -> Response:
        last = request.headers.get("last-event-id") or request.query_params.get("since", "")
        since = int(last) if last.isdecimal() and len(last) < 19 else self._live.revision
        return StreamingResponse(self._live.events(since), media_type="text/event-stream")

    async def healthz(self, request: Request) -> Response:
        """Tell a supervisor whether the database can be read."""
        try:
            async with asyncio.timeout(5):
                await self._read(find_oldest)
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
        )
        template = TEMPLATES.get_template(f"{name}.html")
        return HTMLResponse(template.render(view=view, _=view.translate, **values), status)

    async def stop(self) -> None:
        """End a verification that runs."""
        if self._verifying is not None:
            self._verifying.cancel()
            await asyncio.wait([self._verifying])

    async def _read(self, read: Callable[[Connection], Result]) -> Result:
        return await self._database.read(
            lambda session: session.run_sync(lambda sync: read(sync.connection()))
        )


def local(target: str) -> str:
    """Return a path of this page; of any other address, the first page."""
    is_local = target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if is_local and target.isprintable() else "/"
