"""Large JSON: decode it in steps, between which other coroutines may run.

One call of the decoder for 16 MiB holds the interpreter for up to a second. The text is cut between
elements of lists and dicts instead, and each piece is decoded by itself.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import orjson

PIECE_BYTES = 1 << 16
"""Bytes decoded in one step, except for a longer string or number."""

_SMALLEST_PIECE = 1 << 10

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},"]', re.DOTALL)
_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_SPACE = re.compile(rb"[ \t\n\r]*")
_NUMBER = re.compile(rb"[^][{},: \t\n\r]*")
_CLOSING = {b"[": b"]", b"{": b"}"}


class _CannotCutError(Exception):
    """The text is not JSON, or not of the expected form."""


def decode_in_steps(text: bytes) -> Generator[None, None, Any]:
    """Return the value of JSON text.

    Raises:
        orjson.JSONDecodeError: If the text is not JSON.
    """
    try:
        value, end = yield from _value(text, _skip_space(text, 0), PIECE_BYTES)
        if _skip_space(text, end) == len(text):
            return value
    except (_CannotCutError, orjson.JSONDecodeError):
        pass
    return orjson.loads(text)  # raises an error with the position


def _value(text: bytes, at: int, size: int) -> Generator[None, None, tuple[Any, int]]:
    """Return the value at a position, and the position behind it."""
    opening = text[at : at + 1]
    if opening not in _CLOSING:
        is_text = opening == b'"'
        end = (yield from _string_end(text, at)) if is_text else _end_of(_NUMBER, text, at)
        return orjson.loads(text[at:end]), end
    value: Any = [] if opening == b"[" else {}
    add, closing = value.extend if opening == b"[" else value.update, _CLOSING[opening]
    is_flat = True
    at += 1
    while True:
        yield
        part = text[at : at + size]
        cut, piece = part.rfind(b","), None
        if is_flat and cut > 0:  # most values have no comma inside their elements
            try:
                piece = orjson.loads(b"%b%b%b" % (opening, part[:cut], closing))
            except orjson.JSONDecodeError:
                is_flat = False
        if piece is None:
            cut = _cut_of(part)
            if cut >= 0:
                piece = orjson.loads(b"%b%b%b" % (opening, part[:cut], closing))
        if piece is not None:
            add(piece)
            at, size = at + cut, PIECE_BYTES
            is_empty = not piece
        else:  # one element that is larger than the part
            at = _skip_space(text, at)
            if opening == b"{":
                end = yield from _string_end(text, at)
                key, at = orjson.loads(text[at:end]), _skip_space(text, end)
                if text[at : at + 1] != b":":
                    raise _CannotCutError
                at = _skip_space(text, at + 1)
            element, at = yield from _value(text, at, max(size // 2, _SMALLEST_PIECE))
            add([element] if opening == b"[" else {key: element})
            at, size, is_empty = _skip_space(text, at), PIECE_BYTES, False
        following = text[at : at + 1]
        if following == closing and not (is_empty and value):
            return value, at + 1
        if following != b"," or is_empty:
            raise _CannotCutError
        at += 1


def _cut_of(part: bytes) -> int:
    """Return the end of the container that a part begins in, or of its last whole element.

    It is -1 if even the first element is not whole.
    """
    depth, cut = 0, -1
    for token in _TOKEN.finditer(part):
        start, end = token.span()
        character = part[start]
        if character in b"[{":
            depth += 1
        elif character in b"]}":
            depth -= 1
            if depth < 0:
                return start
        elif character == ord(","):
            if depth == 0:
                cut = start
        elif end - start == 1:  # a quotation mark of which the other one is missing
            break
    return cut


def _string_end(text: bytes, at: int) -> Generator[None, None, int]:
    """Return the position behind the string at a position."""
    if text[at : at + 1] != b'"':
        raise _CannotCutError
    at += 1
    while text[at : at + 1] != b'"':
        match = _STRING.match(text, at, at + PIECE_BYTES)
        if match is None or match.end() == at:
            raise _CannotCutError
        at = match.end()
        yield
    return at + 1


def _skip_space(text: bytes, at: int) -> int:
    return _end_of(_SPACE, text, at)


def _end_of(pattern: re.Pattern[bytes], text: bytes, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None  # it may be empty
    return match.end()
