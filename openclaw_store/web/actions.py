"""The actions of the page: each is one call of the store, and returns to the page it came from."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from openclaw_store.domain import ASSIGNED, TaskFilter
from openclaw_store.errors import (
    ConflictError,
    NodeNotFoundError,
    NotFoundError,
    TaskNotFoundError,
)
from openclaw_store.state_manager import StateManager
from openclaw_store.web.pages import Pages, local
from openclaw_store.web.security import COOKIE, SESSION, Sessions, read_form, root_of

BY_OPERATOR = "by an operator"
"""The reason in the change log, unless the form has one."""

WRONG_TOKEN_SECONDS = 0.5
"""Delay of the answer to a wrong token."""


class Actions:
    """The forms of the page that change the store, or the session."""

    def __init__(self, state: StateManager, pages: Pages, sessions: Sessions | None) -> None:
        self._state = state
        self._pages = pages
        self._sessions = sessions
        self._calls: Mapping[str, Callable[[str, str, str], Awaitable[None]]] = {
            "cancel": self._cancel,
            "requeue": self._requeue,
            "release": self._release,
            "drain": self._drain,
            "resume": self._resume,
            "release_all": self._release_all,
        }

    async def act(self, request: Request) -> Response:
        form = await read_form(request, self._sessions)
        if form is None:
            return await self._pages.refused(request, "The form has expired: send it again.", 403)
        action, id = form.get("action", ""), form.get("id", "")
        call = self._calls.get(action)
        if call is None:
            return await self._pages.refused(request, "There is no such action.", 400)
        reason = form.get("reason", "").strip() or BY_OPERATOR
        await call(id, reason, form.get("attempt", ""))
        page = "node" if action in ("drain", "resume", "release_all") else "task"
        query = urlencode({"id": id, "done": action})
        return RedirectResponse(f"{root_of(request)}/{page}?{query}", 303)

    async def _cancel(self, id: str, reason: str, attempt: str) -> None:
        if not await self._state.cancel_task(id, reason):
            raise TaskNotFoundError(id)

    async def _requeue(self, id: str, reason: str, attempt: str) -> None:
        if not await self._state.requeue_task(id):
            raise TaskNotFoundError(id)

    async def _release(self, id: str, reason: str, attempt: str) -> None:
        task = await self._state.get_task(id)
        if task is None:
            raise TaskNotFoundError(id)
        if attempt not in ("", str(task.attempt)):
            raise ConflictError(f"task {id!r} has moved since the page was shown: look at it again")
        await self._state.release_task(task, reason)

    async def _drain(self, id: str, reason: str, attempt: str) -> None:
        if not await self._state.drain_node(id, reason):
            raise NodeNotFoundError(id)

    async def _resume(self, id: str, reason: str, attempt: str) -> None:
        if not await self._state.resume_node(id):
            raise NodeNotFoundError(id)

    async def _release_all(self, id: str, reason: str, attempt: str) -> None:
        """Release all tasks of a node, page by page."""
        filter = TaskFilter(node=id, status=tuple(ASSIGNED))
        after: str | None = None
        while True:
            page = await self._state.task_repo.list_tasks(filter, after=after)
            releases = (self._state.release_task(task, reason) for task in page)
            for outcome in await asyncio.gather(*releases, return_exceptions=True):
                # A task that has ended or moved meanwhile needs no release.
                if isinstance(outcome, BaseException) and not isinstance(
                    outcome, ConflictError | NotFoundError
                ):
                    raise outcome
            after = page.after
            if after is None:
                return

    async def login(self, request: Request) -> Response:
        """Show the form for the token, or exchange the token for a session."""
        if self._sessions is None:
            return RedirectResponse(f"{root_of(request)}/", 303)
        target = local(request.query_params.get("next", "/"))
        if request.method == "GET":
            return await self._pages.login(request, is_wrong=False)
        form = await read_form(request, None) or {}
        if not self._sessions.is_token(form.get("token", "")):
            await asyncio.sleep(WRONG_TOKEN_SECONDS)
            return await self._pages.login(request, is_wrong=True)
        answer = RedirectResponse(root_of(request) + target, 303)
        answer.set_cookie(
            COOKIE,
            self._sessions.create(),
            int(SESSION.total_seconds()),
            path=root_of(request) or "/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session of this browser."""
        answer = RedirectResponse(f"{root_of(request)}/login", 303)
        answer.delete_cookie(COOKIE, path=root_of(request) or "/")
        return answer
