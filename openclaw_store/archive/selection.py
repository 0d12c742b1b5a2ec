"""Select archived tasks by a `TaskFilter`, with the same result as the conditions in SQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import and_, or_
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from openclaw_store.archive.layout import TASKS
from openclaw_store.domain import FINISHED, TaskFilter
from openclaw_store.encryption import USER_ID, Protection

_EQUAL = {"node": "assigned_node", "user": "user_id", "idempotency_key": "idempotency_key"}
_ONE_OF = {"status": "status", "task_type": "task_type", "priority": "priority"}
_CONTAINS = {"name_contains": "name", "error_contains": "error"}
_FROM = {
    "submitted_from": "submitted_at",
    "completed_from": "completed_at",
    "finished_after": "completed_at",
}
_UNTIL = {
    "submitted_until": "submitted_at",
    "completed_until": "completed_at",
    "finished_before": "completed_at",
}
_JSON = {"skill": "required_skills", "metadata": "metadata"}
_COLUMNS = {**_EQUAL, **_ONE_OF, **_CONTAINS, **_FROM, **_UNTIL, **_JSON}


class Selection:
    """The conditions of a checked filter."""

    def __init__(
        self, filter: TaskFilter, *others: Any, protection: Protection | None = None
    ) -> None:
        """Take further conditions of Arrow as well."""
        self._filter = filter
        self._protection = protection or Protection()
        conditions = [*_conditions(filter, self._protection), *others]
        self.expression = reduce(and_, conditions) if conditions else None
        """The condition for Arrow; `None` if all rows match. Rows that meet it may not match."""
        self.columns = [_JSON[name] for name in _JSON if getattr(filter, name) is not None]
        """The columns that `exactly` needs."""

    def and_also(self, *others: Any) -> Selection:
        """Return a selection with further conditions."""
        return Selection(self._filter, *others, protection=self._protection)

    def exactly(self, table: Any) -> Any:
        """Return the rows that match, from rows that meet the expression."""
        for column in self.columns:
            matches = self._test_of(column)
            table = table.filter(pa.array(map(matches, table[column].to_pylist()), pa.bool_()))
        return table

    def _test_of(self, column: str) -> Callable[[str | None], bool]:
        if column == _JSON["skill"]:
            return partial(_has_skill, skill=self._filter.skill)
        return partial(_has_values, wanted=self._filter.metadata or {})


def _conditions(filter: TaskFilter, protection: Protection) -> Iterator[Any]:
    for name, value in vars(filter).items():
        if value is None:
            continue
        column = pc.field(_COLUMNS[name])
        if name == "user":  # a sealed one begins with a keyed hash
            equal, beginnings = protection.forms_of(USER_ID, value)
            sealed = (pc.starts_with(column, one) for one in beginnings)
            yield reduce(or_, sealed, column.isin(pa.array(equal, pa.string())))
        elif name in _EQUAL:
            yield column == value
        elif name in _ONE_OF:
            values = [getattr(one, "value", one) for one in value]
            yield column.isin(pa.array(values, TASKS.schema.field(_ONE_OF[name]).type))
        elif name in _CONTAINS:
            yield pc.match_substring(column, value)
        elif name in _FROM:
            yield column >= value
        elif name in _UNTIL:
            yield column < value
        else:
            keys = [value] if name == "skill" else [path.split(".")[-1] for path in value]
            for key in keys:
                # In JSON with a backslash, a text may be written in another way.
                text = orjson.dumps(key).decode()
                yield pc.match_substring(column, text) | pc.match_substring(column, "\\")
    if filter.finished_after is not None or filter.finished_before is not None:
        yield pc.field("status").isin([one.value for one in FINISHED])


def _loads(text: str | None) -> Any:
    try:
        return orjson.loads(text or "null")
    except orjson.JSONDecodeError:  # written by hand
        return None


def _has_skill(text: str | None, skill: str | None) -> bool:
    skills = _loads(text)
    return isinstance(skills, list) and skill in skills


def _has_values(text: str | None, wanted: Mapping[str, Any]) -> bool:
    document = _loads(text)
    return all(_has_value(document, path.split("."), one) for path, one in wanted.items())


def _has_value(document: Any, keys: Sequence[str], wanted: Any) -> bool:
    for key in keys:
        if not isinstance(document, dict) or key not in document:
            return False
        document = document[key]
    if isinstance(wanted, bool) or isinstance(document, bool):  # `True` equals 1 in Python
        return document is wanted
    is_number = isinstance(wanted, int | float)
    return type(document) in ((int, float) if is_number else (type(wanted),)) and bool(
        document == wanted
    )
