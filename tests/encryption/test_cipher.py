"""The form of sealed values: round trips, damage, and moves."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pages import DOCS

from openclaw_store import KeyRing, KeyRingError, SealedValueError
from openclaw_store.database.tables import Base
from openclaw_store.encryption import (
    SEALED_FIELDS,
    Key,
    KeyState,
    Protection,
    SealedColumn,
)
from openclaw_store.encryption.cipher import Cipher

KEYS = [Key(1, bytes(range(32))), Key(2, bytes(range(1, 33)))]
TEXT = SealedColumn("tasks", "description", is_json=False)
JSON = SealedColumn("tasks", "result", is_json=True)


def cipher(primary: int | None = 1, *, cluster: int = 7, accepts_clear: bool = False) -> Cipher:
    return Cipher(KeyRing(KEYS, primary), cluster, accepts_clear=accepts_clear)


TEXTS = st.one_of(
    st.text(),
    st.text().map(lambda text: f"$sealed${text}"),
    st.text().map(lambda text: f"$sealed$------${text}"),
    st.text().map(lambda text: f"$sealed$000001${text}"),
).filter(bool)


@given(text=TEXTS, primary=st.sampled_from([None, 1, 2]))
def test_each_text_round_trips(text: str, primary: int | None) -> None:
    one = cipher(primary, accepts_clear=primary is None)

    stored = one.storing(TEXT)("t1", text)

    assert one.loading(TEXT)("t1", stored) == text
    assert (stored == text) <= (primary is None)


@given(text=TEXTS)
def test_each_text_round_trips_without_keys_and_when_keys_are_turned_on(text: str) -> None:
    stored = Protection().storing(TEXT)("t1", text)

    assert Protection().loading(TEXT)("t1", stored) == text
    assert cipher(accepts_clear=True).loading(TEXT)("t1", stored) == text


@given(value=st.one_of(TEXTS, st.lists(TEXTS), st.integers(), st.none()))
def test_each_json_round_trips_and_is_stored_as_json(value: object) -> None:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    row: list[object] = [text]
    for protection in (cipher(), Protection()):
        protection.storing_row([(0, JSON)])("t1", row)
        json.loads(str(row[0]))
        protection.loading_row([(0, JSON)])("t1", row)

        assert row == [text]


def flips(stored: str) -> list[str]:
    return [
        f"{stored[:at]}{chr(ord(stored[at]) ^ (1 << bit))}{stored[at + 1 :]}"
        for at in range(len(stored))
        for bit in range(8)
    ]


@pytest.mark.parametrize("place", [TEXT, JSON], ids=["text", "json"])
def test_every_flipped_bit_and_every_shorter_text_is_an_error_that_names_the_row(
    place: SealedColumn,
) -> None:
    one = cipher()
    for length in range(1, 8):
        text = f'"{"x" * length}"'
        stored = one.storing(place)("t1", text)
        damaged = [*flips(stored), *(stored[:end] for end in range(1, len(stored)))]

        for value in damaged:
            with pytest.raises(SealedValueError) as error:
                one.loading(place)("t1", value)
            assert (error.value.table, error.value.row_id) == ("tasks", "t1")
            assert error.value.field == place.column


def test_moved_value_does_not_open() -> None:
    stored = cipher().storing(TEXT)("t1", "a secret")
    others = [
        (cipher(), TEXT, "t2"),
        (cipher(), SealedColumn("tasks", "error", is_json=False), "t1"),
        (cipher(), SealedColumn("nodes", "description", is_json=False), "t1"),
        (cipher(cluster=8), TEXT, "t1"),
    ]

    assert cipher(2).loading(TEXT)("t1", stored) == "a secret"
    for one, place, id in others:
        with pytest.raises(SealedValueError, match="another row, column or cluster"):
            one.loading(place)(id, stored)


def test_value_of_a_missing_key_names_the_key() -> None:
    stored = cipher(2).storing(TEXT)("t1", "a secret")
    ring = KeyRing(KEYS[:1], 1)

    with pytest.raises(SealedValueError, match="key 2, which the key ring lacks"):
        Cipher(ring, 7, accepts_clear=False).loading(TEXT)("t1", stored)


def test_process_without_keys_refuses_a_sealed_value() -> None:
    row: list[object] = [cipher().storing(TEXT)("t1", "a secret")]

    with pytest.raises(SealedValueError, match="no keys"):
        Protection().loading_row([(0, TEXT)])("t1", row)


def test_value_in_clear_is_refused_once_all_values_are_sealed() -> None:
    for value in ("clear", "$sealed$------$clear"):
        with pytest.raises(SealedValueError):
            cipher().loading(TEXT)("t1", value)


def test_same_text_is_sealed_differently_each_time() -> None:
    seal = cipher().storing(TEXT)

    assert len({seal("t1", "a secret") for _ in range(100)}) == 100


def test_fixed_reasons_stay_clear_and_others_do_not() -> None:
    reason = SealedColumn("changes", "reason", is_json=False)

    assert cipher().storing(reason)("task:t1", "node lost") == "node lost"
    assert cipher().loading(reason)("task:t1", "node lost") == "node lost"
    assert "secret" not in cipher().storing(reason)("task:t1", "released: secret")


def test_reference_lists_each_column_as_sealed_or_with_a_reason_to_be_clear() -> None:
    reference = (DOCS / "reference" / "encryption.md").read_text()
    sealed, clear = reference.split("## Fields in clear")
    lines = re.findall(r"^\| `(\w+)` \| (`.+`) \| (.+) \|$", clear, re.MULTILINE)
    for name in ("tasks", "nodes", "changes", "outgoing"):
        reasons = [re.findall(r"`(\w+)`", columns) for table, columns, _ in lines if table == name]
        columns = sorted(column for one in reasons for column in one)

        assert columns == sorted(set(Base.metadata.tables[name].c.keys()) - {*SEALED_FIELDS[name]})
    for name, fields in SEALED_FIELDS.items():
        [named] = re.findall(rf"^\| `{name}`.* \| (.+) \|$", sealed, re.MULTILINE)[:1]
        assert tuple(re.findall(r"`(\w+)`", named)) == tuple(fields)


def test_no_key_appears_in_a_repr_or_error() -> None:
    secret = random.randbytes(32)
    ring = KeyRing([Key(3, secret), Key(4, None, wrapped=secret)], 3, provider=object())  # type: ignore[arg-type]
    shown = (
        f"{ring!r} {ring.keys!r} {Cipher(KeyRing([Key(3, secret)], 3), 7, accepts_clear=True)!r}"
    )

    assert repr(secret)[2:-1] not in shown
    assert secret.hex() not in shown
    with pytest.raises(KeyRingError) as error:
        KeyRing([Key(3, secret[:31])], 3)
    assert repr(secret[:31])[2:-1] not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "primary"),
    [
        ([], None),
        ([KEYS[0], KEYS[0]], 1),
        (KEYS, 3),
        ([Key(1, bytes(32), KeyState.RETIRED)], 1),
        ([Key(0, bytes(32))], 0),
        ([Key(1, None)], 1),
    ],
)
def test_wrong_key_ring_is_refused(keys: list[Key], primary: int | None) -> None:
    with pytest.raises(KeyRingError):
        KeyRing(keys, primary)
