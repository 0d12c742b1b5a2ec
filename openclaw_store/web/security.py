"""What protects the page: the token, sessions of browsers, and headers of every answer.

A browser exchanges the token for a signed cookie, which other sites cannot send along. A form
carries a second secret, made from the session. Scripts and styles come from the page itself alone.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openclaw_store.domain import Clock

MIN_TOKEN_LENGTH = 16
"""Characters that a token must have."""

SESSION = timedelta(hours=12)
"""Time after which a browser must present the token again."""

COOKIE = "openclaw_store_session"

MAX_FORM_BYTES = 64 << 10
"""Longest body of a form."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every answer."""

_OPEN = ("/login", "/healthz", "/static/")
"""Paths that need no token."""


class Sessions:
    """Signed sessions, which need no memory on the server; a new token ends all of them."""

    def __init__(self, token: str, clock: Clock) -> None:
        self._token = token.encode()
        self._key = hashlib.sha256(b"openclaw-store session\0" + self._token).digest()
        self._clock = clock

    def is_token(self, given: str) -> bool:
        """Return true if a caller knows the token, in a time that does not depend on its text."""
        return hmac.compare_digest(given.encode(), self._token)

    def create(self) -> str:
        """Return the cookie of a new session."""
        until = int((self._clock() + SESSION).timestamp())
        session = f"{until}.{secrets.token_hex(16)}"
        return f"{session}.{self._sign('session', session)}"

    def is_valid(self, cookie: str) -> bool:
        """Return true if this server has made a session that has not expired."""
        session, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign("session", session).encode()):
            return False
        return int(session.partition(".")[0]) > self._clock().timestamp()

    def form_secret(self, cookie: str) -> str:
        """Return the secret that the forms of a session carry."""
        return self._sign("form", cookie)

    def _sign(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}\0{text}".encode(), "sha256").hexdigest()


class Guard:
    """Refuse callers without the token, and requests from other sites; set the headers."""

    def __init__(
        self, app: ASGIApp, sessions: Sessions | None, hosts: Sequence[str] | None
    ) -> None:
        self._app = app
        self._sessions = sessions
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        answer = self._refusal(Request(scope)) or self._app
        await answer(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        """Return the answer to a caller that may not do this."""
        if self._hosts is not None and _name_of_host(request) not in self._hosts:
            return PlainTextResponse("this page has another name", 421)
        site = request.headers.get("sec-fetch-site", "same-origin")
        if request.method == "POST" and site not in ("same-origin", "none"):
            return PlainTextResponse("this form is of another site", 403)
        root = root_of(request)
        path = request.url.path.removeprefix(root)
        if self._sessions is None or path.startswith(_OPEN) or self._is_known(request):
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            query = f"?{request.url.query}" if request.url.query else ""
            return RedirectResponse(f"{root}/login?{urlencode({'next': path + query})}", 303)
        return PlainTextResponse("the token is missing", 401, {"WWW-Authenticate": "Bearer"})

    def _is_known(self, request: Request) -> bool:
        sessions = self._sessions
        assert sessions is not None
        given = _bearer_of(request)
        if given is not None:
            return sessions.is_token(given)
        return sessions.is_valid(request.cookies.get(COOKIE, ""))


async def read_form(request: Request, sessions: Sessions | None) -> dict[str, str] | None:
    """Return the fields of a form; `None` if the form is not one of this session."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            return None
    fields = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
    # A browser sends no bearer by itself, but other headers, as `Basic` for a proxy.
    if sessions is None or _bearer_of(request) is not None:
        return fields
    wanted = sessions.form_secret(request.cookies.get(COOKIE, ""))
    return (
        fields if hmac.compare_digest(fields.get("secret", "").encode(), wanted.encode()) else None
    )


def root_of(request: Request) -> str:
    """Return the prefix under which the page is mounted, without a slash at its end."""
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


def _bearer_of(request: Request) -> str | None:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    return given.strip() if kind.lower() == "bearer" else None


def _name_of_host(request: Request) -> str:
    host = request.headers.get("host", "")
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
