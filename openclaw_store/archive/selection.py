"""Select archived tasks by a `TaskFilter`, with the same result as the conditions in SQL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from openclaw_store.archive.files import ArchiveFile
from openclaw_store.database import to_microseconds
from openclaw_store.domain import FINISHED, TaskFilter

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


class Selection:
    """The conditions of a checked filter."""

    def __init__(self, filter: TaskFilter) -> None:
        self._given = {name: one for name, one in vars(filter).items() if one is not None}
        named = {**_EQUAL, **_ONE_OF, **_CONTAINS, **_FROM, **_UNTIL, **_JSON}
        self.columns = {named[name] for name in self._given}
        if {"finished_after", "finished_before"} & self._given.keys():
            self.columns.add("status")
        self.is_everything = not self._given

    def may_match(self, file: ArchiveFile, group: int) -> bool:
        """Return false if no row of a row group can match."""
        for name, value in self._given.items():
            column = {**_EQUAL, **_FROM, **_UNTIL}.get(name)
            if column is None:
                continue
            least, most = file.bounds(column)[group]
            if least is None:  # no row has a value, or the values are too long
                continue
            if isinstance(value, datetime):
                value = to_microseconds(value)
            if (name not in _UNTIL and most < value) or (name not in _FROM and least > value):
                return False
        return True

    def mask(self, table: Any) -> Any:
        """Return for each row whether it matches."""
        mask = pa.array([True] * len(table), pa.bool_())
        for condition in self._conditions(table):
            mask = pc.and_(mask, pc.fill_null(condition, False))
        for name in _JSON.keys() & self._given.keys():
            mask = self._mask_of_json(name, table, mask)
        return mask

    def _conditions(self, table: Any) -> Iterator[Any]:
        for name, value in self._given.items():
            if name in _EQUAL:
                yield pc.equal(table[_EQUAL[name]], value)
            elif name in _ONE_OF:
                values = [getattr(one, "value", one) for one in value]
                column = table[_ONE_OF[name]]
                yield pc.is_in(column, pa.array(values, column.type))
            elif name in _CONTAINS:
                yield pc.match_substring(table[_CONTAINS[name]], value)
            elif name in _FROM:
                yield pc.greater_equal(table[_FROM[name]], value)
            elif name in _UNTIL:
                yield pc.less(table[_UNTIL[name]], value)
        if {"finished_after", "finished_before"} & self._given.keys():
            yield pc.is_in(table["status"], pa.array([one.value for one in FINISHED]))

    def _mask_of_json(self, name: str, table: Any, mask: Any) -> Any:
        """Read the JSON of the rows that match so far, and that contain the text if any."""
        wanted = self._given[name]
        texts = [wanted] if name == "skill" else [path.split(".")[-1] for path in wanted]
        column = table[_JSON[name]]
        for text in texts:
            # In JSON with a backslash, a text may be written in another way.
            has_text = pc.or_(
                pc.match_substring(column, orjson.dumps(text).decode()),
                pc.match_substring(column, "\\"),
            )
            mask = pc.and_(mask, pc.fill_null(has_text, False))
        rows = pc.indices_nonzero(mask)
        matches = _has_skill if name == "skill" else _has_values
        found = [matches(text, wanted) for text in column.take(rows).to_pylist()]
        result = [False] * len(table)
        for row, is_match in zip(rows.to_pylist(), found, strict=True):
            result[row] = is_match
        return pa.array(result, pa.bool_())


def _loads(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # written by hand
        return None


def _has_skill(text: str, skill: str) -> bool:
    skills = _loads(text)
    return isinstance(skills, list) and skill in skills


def _has_values(text: str, wanted: dict[str, Any]) -> bool:
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
