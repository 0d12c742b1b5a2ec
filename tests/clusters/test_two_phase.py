"""`transaction(a, b, two_phase=True)` and `resolve`: one transaction over several databases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Location, Maker, MakeTask, assert_in_step, engine_of, execute, give_up, until

from openclaw_store import (
    Database,
    InvalidDataError,
    Level,
    OutcomeUnknownError,
    StateManager,
    TaskRepository,
    UnavailableError,
    diagnose,
    resolve,
    transaction,
    verify,
)
from openclaw_store.backends.postgresql import listening
from openclaw_store.clusters import two_phase
from openclaw_store.clusters.two_phase import Participant, TwoPhaseCommit
from openclaw_store.database import end_prepared

pytestmark = pytest.mark.postgresql

Places = list[Location]


@pytest.fixture
def places(maker: Maker, migrated_postgresql: str, tmp_path: Path) -> Iterator[Places]:
    """Two databases of a server, and a file: no engine transaction writes to two of them."""
    urls = [maker.make(migrated_postgresql) for _ in range(2)]
    for number, url in enumerate(urls, 1):
        execute(url, f"UPDATE counters SET cluster_id = {number}")
        if execute(url, "SHOW max_prepared_transactions") == [("0",)]:
            give_up("max_prepared_transactions is 0 on the server of the tests")
    yield [*urls, tmp_path / "file.db"]
    for url in urls:
        maker.drop(url)


Open = Callable[..., Any]


@pytest.fixture
async def open_all(places: Places) -> AsyncIterator[Open]:
    """Opens a manager for each place, and closes them at the end."""
    async with AsyncExitStack() as stack:

        async def open_all(interval: float | None = None) -> list[StateManager]:
            made = [StateManager(Database(place, timeout=10), interval) for place in places]
            return [await stack.enter_async_context(one) for one in made]

        yield open_all


@pytest.fixture
async def managers(open_all: Open) -> AsyncIterator[list[StateManager]]:
    """A manager of each place."""
    made: list[StateManager] = await open_all()
    yield made
    await assert_in_step(*made)


async def add_to_each(managers: list[StateManager], make_task: MakeTask) -> None:
    async with transaction(*[one.db for one in managers], two_phase=True) as sessions:
        for tx in sessions:
            await TaskRepository(tx).create(make_task())


async def counts(*managers: StateManager) -> list[int]:
    return [await one.task_repo.count_tasks() for one in managers]


def rest(places: Places) -> tuple[int, int]:
    """The numbers of prepared transactions and of decisions that are left."""
    prepared = execute(places[0], "SELECT gid FROM pg_prepared_xacts WHERE gid LIKE 'openclaw%'")
    decisions = [execute(one, "SELECT * FROM decisions") for one in places]
    return len(prepared), sum(map(len, decisions))


@pytest.mark.parametrize("chosen", [(0, 1), (1, 0, 2), (2, 0)])
async def test_all_databases_commit_together(
    managers: list[StateManager], places: Places, make_task: MakeTask, chosen: tuple[int, ...]
) -> None:
    given = [managers[one] for one in chosen]

    await add_to_each(given, make_task)

    assert await counts(*given) == [1] * len(given)
    assert [len(await one.get_pending_tasks()) for one in given] == [1] * len(given)
    assert rest(places) == (0, 0)
    for one in given:
        assert await verify(one.db)


async def test_other_processes_hear_of_the_commit(
    managers: list[StateManager],
    open_all: Open,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "ALIVE_SECONDS", 3600)  # a notification alone tells them
    foreign = await open_all(3600)

    await add_to_each(managers, make_task)

    await until(lambda: [one.version for one in foreign] == [1, 1, 1])


async def test_error_rolls_all_back(
    managers: list[StateManager], places: Places, make_task: MakeTask
) -> None:
    execute(places[1], "ALTER TABLE tasks ADD CONSTRAINT refused CHECK (name <> 'bad')")

    async def fail(name: str) -> None:
        databases = [one.db for one in managers]
        async with transaction(*databases, two_phase=True) as sessions:
            for tx in sessions:
                await TaskRepository(tx).create(make_task(name=name))
            if name == "good":
                raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        await fail("good")
    with pytest.raises(InvalidDataError):
        await fail("bad")

    assert await counts(*managers) == [0, 0, 0]
    assert rest(places) == (0, 0)
    await add_to_each(managers, make_task)


@pytest.mark.parametrize("chosen", [(0, 1), (0, 1, 2)])
async def test_failed_decision_rolls_all_back(
    managers: list[StateManager],
    places: Places,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    chosen: tuple[int, ...],
) -> None:
    given = [managers[one] for one in chosen]

    async def refuse(self: TwoPhaseCommit) -> None:
        assert rest(places)[0] == len(chosen) - 1
        raise UnavailableError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(TwoPhaseCommit, "_decide", refuse)
        with pytest.raises(UnavailableError, match="the disk is full"):
            await add_to_each(given, make_task)

    assert rest(places) == (0, 0)
    assert await counts(*managers) == [0, 0, 0]
    await add_to_each(given, make_task)  # no lock is left


class KilledError(BaseException):
    """The process ends here: nothing of it runs any more."""


@pytest.mark.parametrize("moment", ["prepared", "decided", "committed"])
@pytest.mark.parametrize("chosen", [(0, 1), (0, 1, 2)])
async def test_transaction_of_a_killed_process_is_resolved(
    managers: list[StateManager],
    places: Places,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    chosen: tuple[int, ...],
) -> None:
    given = [managers[one] for one in chosen]
    databases = [one.db for one in given]

    async def killed(*_: object, **__: object) -> Any:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(TwoPhaseCommit, "_roll_back", killed)
        target = {"prepared": "_decide", "decided": "_commit", "committed": "settle"}[moment]
        patched.setattr(TwoPhaseCommit, target, killed)
        with pytest.raises(KilledError):
            await add_to_each(given, make_task)
    parts = len(chosen) - 1 if moment != "committed" else 0
    assert rest(places) == (parts, int(moment != "prepared"))
    if moment != "committed":
        [held] = [
            one
            for one in await diagnose(databases[0])
            if one.level is not Level.OK and one.name == "prepared_transactions"
        ]
        assert "openclaw-store resolve" in (held.advice or "")

    early = await resolve(*databases)  # it may be at work still
    alone = await resolve(databases[0], older_than=0)
    await resolve(databases[-1], older_than=0)  # the one that decides keeps what others need
    assert rest(places) == (parts, int(moment == "decided"))
    found = await resolve(*databases, older_than=0)

    if moment != "committed":
        assert (early.committed, early.rolled_back) == (0, 0)
        assert not alone
        assert "give it too" in str(alone.left)
    assert found
    expected = (0, parts) if moment == "prepared" else (parts, 0)
    assert (found.committed, found.rolled_back) == expected
    assert await counts(*given) == [int(moment != "prepared")] * len(given)
    assert rest(places) == (0, 0)


async def test_copy_of_the_database_that_decides_is_refused(
    managers: list[StateManager],
    make_task: MakeTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: the copy, which lacks the decision, is asked: the other part is rolled back."""
    one, _, file = managers
    await file.db.backup(tmp_path / "copy.db")

    async def killed(*_: object) -> Any:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(TwoPhaseCommit, "_commit", killed)
        with pytest.raises(KilledError):
            await add_to_each([one, file], make_task)

    async with Database(tmp_path / "copy.db") as copy:
        with pytest.raises(InvalidDataError, match=r"copy\.db, of which one is a copy"):
            await resolve(one.db, file.db, copy, older_than=0)
    assert await resolve(one.db, file.db, file.db, older_than=0)
    assert await counts(one, file) == [1, 1]


async def test_next_transaction_ends_an_old_one(
    managers: list[StateManager],
    places: Places,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def killed(*_: object) -> Any:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(TwoPhaseCommit, "_commit", killed)
        with pytest.raises(KilledError):
            await add_to_each(managers, make_task)
    monkeypatch.setattr(two_phase, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("openclaw_store.clusters.resolver.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(resolve, "__kwdefaults__", {"older_than": 0.0})

    await add_to_each(managers, make_task)

    assert await counts(*managers) == [2, 2, 2]
    assert rest(places) == (0, 0)


async def test_slow_process_fails_or_decides_before_it_is_resolved(
    managers: list[StateManager],
    places: Places,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`resolve` waits for the process, which has the lock of the database that decides."""
    databases = [one.db for one in managers[:2]]
    decide = TwoPhaseCommit._decide
    resolved: list[Any] = []

    async def slow(self: TwoPhaseCommit) -> None:
        async with Database(places[0], timeout=0.5) as one, Database(places[1], timeout=0.5) as two:
            resolved.append(await resolve(one, two, older_than=0))
        await decide(self)

    monkeypatch.setattr(TwoPhaseCommit, "_decide", slow)
    await add_to_each(managers[:2], make_task)

    assert len(resolved[0].left) == 1
    assert (resolved[0].committed, resolved[0].rolled_back) == (0, 0)
    assert await resolve(*databases, older_than=0)
    assert await counts(*managers[:2]) == [1, 1]


async def test_lost_server_leaves_the_outcome_to_resolve(
    managers: list[StateManager],
    places: Places,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def lost(*_: object, **__: object) -> bool:
        raise UnavailableError("the connection was lost")

    with monkeypatch.context() as patched:
        patched.setattr(two_phase, "end_prepared", lost)
        with pytest.raises(OutcomeUnknownError, match="has committed"):
            await add_to_each(managers, make_task)

    # The call itself has tried again when it failed.
    assert await counts(*managers) == [1, 1, 1]
    assert rest(places) == (0, 0)


async def test_databases_that_cannot_take_part_are_refused(
    managers: list[StateManager], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, file = [manager.db for manager in managers]

    async def enter(*databases: Database) -> None:
        async with transaction(*databases, two_phase=True):
            raise AssertionError

    async with Database(tmp_path / "another.db") as another:
        for databases in ((one, one), (one, file, another)):
            with pytest.raises(InvalidDataError, match="databases"):
                await enter(*databases)
    participant = two_phase._participant

    async def without_slots(database: Database) -> Participant:
        return (await participant(database))._replace(slots=0)

    monkeypatch.setattr(two_phase, "_participant", without_slots)
    with pytest.raises(UnavailableError, match="max_prepared_transactions is 0: set it"):
        await enter(one, two)


async def test_transaction_of_another_role_or_program_is_left(
    managers: list[StateManager], places: Places
) -> None:
    one, two = [manager.db for manager in managers[:2]]
    own, odd = f"openclaw_store_2_{'0' * 32}_1", "openclaw_store_2_'' OR_1"
    await send(places[0], "CREATE ROLE another_preparer")
    prepare = "BEGIN; SET LOCAL ROLE another_preparer; SELECT 1; PREPARE TRANSACTION '{}'"
    for name in (own, odd):
        await send(places[0], prepare.format(name))

    found = await resolve(one, two, older_than=0)

    role = "another_preparer"
    assert found.left == {own: f"the role {role} has prepared it: resolve it as {role}"}
    assert rest(places)[0] == 2
    for name in (own, odd):
        assert await end_prepared(one, name, commit=False)
    await send(places[0], "DROP ROLE another_preparer")


async def send(place: Location, statements: str) -> None:
    """Run statements outside a transaction."""
    async with engine_of(place).connect() as connection:
        raw: Any = await connection.get_raw_connection()
        await raw.driver_connection.execute(statements)
