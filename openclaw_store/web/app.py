"""The page as an ASGI program: its addresses, and what stands before each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from openclaw_store.errors import InvalidDataError, NotFoundError, StoreError
from openclaw_store.state_manager import StateManager
from openclaw_store.web.actions import Actions
from openclaw_store.web.live import Live
from openclaw_store.web.pages import Pages
from openclaw_store.web.security import MIN_TOKEN_LENGTH, Guard, Sessions

Clusters = Callable[[], Awaitable[Sequence[Mapping[str, str]]]]
"""Returns the clusters for their page: each has a `name`, and texts under other headings."""


def app(
    state: StateManager,
    *,
    token: str | None = None,
    allow_actions: bool = False,
    hosts: Sequence[str] | None = None,
    clusters: Clusters | None = None,
) -> Starlette:
    """Return the page of a store as an ASGI program, to be served or mounted under a prefix.

    It follows the store from the first request until the store is shut down, or until the coroutine
    function `state.stop` of the program is called, which also the end of its lifespan does.

    Args:
        state: The store, which is open; the program does not close it.
        token: Required of every caller, as `Authorization: Bearer …` or by a form; `None` lets
            everybody read who reaches the page.
        allow_actions: Let callers change tasks and nodes. This needs a token.
        hosts: Names under which the page may be called; `None` for any. A page on this machine
            without a token should have them: a web site could direct its own name here.
        clusters: Returns the clusters; `None` for no such page.

    Raises:
        InvalidDataError: If the token is too short, or actions are allowed without one.
    """
    if token is not None and len(token) < MIN_TOKEN_LENGTH:
        raise InvalidDataError("token", f"must have at least {MIN_TOKEN_LENGTH} characters")
    if allow_actions and token is None:
        raise InvalidDataError("token", "must be given if actions are allowed")
    sessions = None if token is None else Sessions(token, state.db.clock)
    live = Live(state)
    pages = Pages(state, live, sessions, clusters, allow_actions=allow_actions)
    actions = Actions(state, pages, sessions)

    async def stop() -> None:
        await live.stop()
        await pages.stop()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await live.start()
        try:
            yield
        finally:
            await stop()

    async def refused(request: Request, error: Exception) -> Response:
        status = 404 if isinstance(error, NotFoundError) else 400
        if not isinstance(error, NotFoundError | InvalidDataError):
            status = 409 if request.method == "POST" else 503
        return await pages.refused(request, str(error), status)

    get, post = ["GET"], ["POST"]
    routes: list[Route | Mount] = [
        Route("/", pages.overview, methods=get),
        Route("/tasks", pages.tasks, methods=get),
        Route("/task", pages.task, methods=get),
        Route("/nodes", pages.nodes, methods=get),
        Route("/node", pages.node, methods=get),
        Route("/changes", pages.changes, methods=get),
        Route("/health", pages.health, methods=get),
        Route("/verify", pages.verify, methods=post),
        Route("/preferences", pages.preferences, methods=get),
        Route("/login", actions.login, methods=[*get, *post]),
        Route("/logout", actions.logout, methods=post),
        Route("/events", pages.events, methods=get),
        Route("/healthz", pages.healthz, methods=get),
        Route("/metrics", pages.metrics, methods=get),
        Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
    ]
    if clusters is not None:
        routes.append(Route("/clusters", pages.clusters, methods=get))
    if allow_actions:
        routes.append(Route("/action", actions.act, methods=post))
    page = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, sessions=sessions, hosts=hosts)],
        exception_handlers={StoreError: refused},
        lifespan=lifespan,
    )
    page.state.stop = stop
    return page
