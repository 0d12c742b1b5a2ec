"""Large JSON: the same value as from the decoder, in steps of bounded size."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openclaw_store import InvalidDataError
from openclaw_store.domain import large_json, validation
from openclaw_store.domain.large_json import decode_in_steps
from openclaw_store.domain.validation import Steps, encode_in_steps, encode_json, encode_texts

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text() | st.floats(0, 1),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=25,
)


@pytest.fixture(autouse=True, scope="module")
def short_pieces() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_json, "PIECE_BYTES", 24)
        patch.setattr(large_json, "_SMALLEST_PIECE", 6)
        yield


def finish(steps: Steps[Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def outcome(text: bytes, *, in_steps: bool) -> Any:
    """The value with the types of its elements and the order of its keys, or the error."""
    try:
        return repr(finish(decode_in_steps(text)) if in_steps else orjson.loads(text))
    except orjson.JSONDecodeError as error:
        return str(error)


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_value_is_that_of_the_decoder(value: Any, indent: int | None, is_ascii: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
    assert outcome(text.encode(), in_steps=True) == outcome(text.encode(), in_steps=False)


@pytest.mark.parametrize(
    "text", [b"[,1]", b"[1,]", b'{,"a":1}', b'{"a":1,}', b"[1,,2]", b"[1}", b"[,]"]
)
def test_comma_without_an_element_is_refused(text: bytes) -> None:
    assert outcome(text, in_steps=True) == outcome(text, in_steps=False)


@given(VALUES, st.data())
def test_text_that_is_not_json_is_refused_by_the_same_error(value: Any, data: Any) -> None:
    text = bytearray(orjson.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        if data.draw(st.booleans()):
            del text[at]
        else:
            text[at:at] = bytes([data.draw(st.sampled_from(b',:]}[{"\\1'))])
        if not text:
            return
    assert outcome(bytes(text), in_steps=True) == outcome(bytes(text), in_steps=False)


@pytest.mark.parametrize(
    "value",
    [
        [[] for _ in range(2000)],
        {"a": [[] for _ in range(2000)]},
        {str(number): number for number in range(500)},
        [{"id": number, "tags": ["a", "b"], "text": "[,{"} for number in range(200)],
        [[[[[[[list(range(1000))]]]]]], 1] * 2,
        ['"\\' * 3 for _ in range(500)],
    ],
)
def test_no_step_decodes_more_than_a_piece(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Decoder:
        JSONDecodeError = orjson.JSONDecodeError

        @staticmethod
        def loads(text: bytes) -> Any:
            sizes.append(len(text))
            return orjson.loads(text)

    text = orjson.dumps(value)
    monkeypatch.setattr(large_json, "orjson", Decoder)
    steps = decode_in_steps(text)
    number = sum(1 for _ in steps)

    assert finish(decode_in_steps(text)) == value
    assert max(sizes) <= 24 + 2
    assert number >= len(text) // 24


def test_each_step_checks_a_limited_number_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_ELEMENTS", 10)
    for encode, value in ((encode_json, {"a": [[[1]] * 5] * 20}), (encode_texts, ["a"] * 200)):
        steps = encode_in_steps(encode, "field", value)

        assert sum(1 for _ in steps) >= 20
        assert finish(encode_in_steps(encode, "field", value)) == orjson.dumps(value)


def test_value_that_is_changed_between_two_steps_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation, "_ELEMENTS", 10)
    value = {str(number): number for number in range(100)}
    steps = encode_in_steps(encode_json, "field", value)
    next(steps)

    value["new"] = 1

    with pytest.raises(InvalidDataError, match="field: was changed while it was checked"):
        finish(steps)
