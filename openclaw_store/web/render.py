"""Rendering: what all templates share, the formats of values, and the language of a request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request

from openclaw_store.domain import NodeStatus, TaskStatus
from openclaw_store.maintenance.read_around import Unreadable
from openclaw_store.web.security import root_of

_HERE = Path(__file__).parent

CHINESE: dict[str, str] = json.loads((_HERE / "zh.json").read_text(encoding="utf-8"))
"""The texts of the page in Chinese, by the English ones."""

DONE = {
    "cancel": "The task is cancelled.",
    "requeue": "The task is pending again.",
    "release": "The task is released.",
    "drain": "The node gets no more tasks.",
    "resume": "The node gets tasks again.",
    "release_all": "The tasks of the node are released.",
}
"""The sentence after each action."""

LONGEST = 20_000
"""Characters of a value that are shown."""


class View:
    """What a template knows of its request."""

    def __init__(
        self,
        request: Request,
        name: str,
        revision: int,
        secret: str,
        *,
        can_act: bool,
        has_sessions: bool,
        has_clusters: bool,
        left_out: Sequence[Unreadable],
    ) -> None:
        self.name = name
        self.revision = revision
        self.secret = secret
        self.can_act = can_act
        self.has_sessions = has_sessions
        self.has_clusters = has_clusters
        self.left_out = left_out
        self.root = root_of(request)
        self.language = _language_of(request)
        self.theme = request.cookies.get("openclaw_store_theme", "")
        self.done = request.query_params.get("done", "")
        path = request.url.path.removeprefix(self.root)
        self._here = f"{path}?{request.url.query}" if request.url.query else path

    def translate(self, text: str) -> str:
        """Return a text in the language of the request."""
        return CHINESE.get(text, text) if self.language == "zh" else text

    def link(self, path: str, **query: str) -> str:
        """Return the address of a page."""
        return f"{self.root}{path}" + (f"?{urlencode(query)}" if query else "")

    def preference(self, **values: str) -> str:
        """Return the address that sets a preference, and comes back here."""
        return self.link("/preferences", **values, next=self._here)

    @property
    def labels(self) -> str:
        """The names of statuses for the script, as JSON."""
        return json.dumps({one: self.translate(one) for one in (*TaskStatus, *NodeStatus)})


def _language_of(request: Request) -> str:
    chosen = request.cookies.get("openclaw_store_lang", "")
    accepted = request.headers.get("accept-language", "").lower()
    return "zh" if chosen == "zh" or (not chosen and accepted.startswith("zh")) else "en"


def moment(value: datetime | None) -> str | Markup:
    """Format a time in UTC; the script shows it in local time if that is wanted."""
    if value is None:
        return "–"
    exact = value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    text = value.replace(tzinfo=None).isoformat(" ", "seconds")
    return Markup('<time datetime="{}">{} UTC</time>').format(exact, text)


def duration(value: timedelta | float | None) -> str:
    """Format a duration in one or two units: `350 ms`, `2.5 s`, `2 h 5 min`."""
    if value is None:
        return "–"
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)


def number(value: float | None) -> str:
    """Format a number with separators."""
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:,g}"


def document(value: Any) -> str:
    """Format a value of JSON, its beginning if it is long."""
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


TEMPLATES = Environment(
    loader=FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""The templates; every value in them is escaped."""
TEMPLATES.filters.update(moment=moment, duration=duration, number=number, document=document)
TEMPLATES.globals["DONE"] = DONE
