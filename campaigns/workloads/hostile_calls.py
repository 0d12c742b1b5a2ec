"""Random calls with hostile values, for a pair of stores of different kinds."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from campaigns.harness.campaign import Location
from campaigns.harness.direct_access import SecondClient
from campaigns.workloads.values import Values, hints_of
from openclaw_store import (
    Backoff,
    Database,
    NodeInfo,
    NodeRepository,
    StateManager,
    Task,
    TaskRepository,
    TaskStatus,
    TaskType,
)
from openclaw_store.testing import FakeClock

WAIT_SECONDS = 0.3
"""Time limit, in seconds, of a call that waits for an event."""

WAITING_CALLS = ("StateManager.watch", "StateManager.watch_progress", "StateManager.wait_for_task")

NOT_CALLED = {
    "StateManager.initialize": "takes nothing; each pair begins with it",
    "StateManager.shutdown": "takes nothing; each pair ends with it",
    "StateManager.get_stats": "takes nothing, and returns sizes and times",
    "Database.initialize": "is what each pair begins with",
    "Database.close": "takes nothing; each pair ends with it",
    "TaskRepository.get_records": "takes the identifiers that get_tasks has checked",
    "Database.session": "takes nothing",
    "Database.get_stats": "takes nothing, and returns sizes and times",
    "Database.vacuum": "takes nothing",
    "Database.refuse_inside": "takes nothing",
    "Database.read": "takes a function of the library's own",
    "Database.inspect": "takes a function of the library's own",
    "Database.write": "takes a function of the library's own",
    "Database.read_in": "takes a function of the library's own",
    "Database.write_in": "takes a function of the library's own",
    "Database.listen": "takes a function of the library's own",
    "Database.follow": "takes a function of the library's own",
    "Database.backup": "is called with hostile paths, now and then",
    "Database.alter": "takes a function of the library's own",
    "Database.joined": "is called with a session of the caller; see test_joined.py",
    "Database.rekey": "needs keys; see tests/encryption",
    "Database.unseal": "needs keys; see tests/encryption",
    "Database.transaction": "is called with hostile limits, now and then",
}
"""Public methods that are not called like the rest, with the reason."""

TABLES = ("tasks", "nodes", "changes", "counters")

LOCATIONS: tuple[Any, ...] = (
    "", "\0", "sqlite://", "sqlite:///:memory:", "sqlite:///\0", "postgresql://", "mysql://u:p@h/x",
    "postgresql://[::1", "postgresql://h:port/x", "http://x", "://", "a://b", 5, None, b"x", True,
)  # fmt: skip
"""Paths where no database can be; none of them names a file."""

LIMITS: tuple[Any, ...] = (
    -1, 0, -0.0, math.nan, math.inf, "5", None, True, b"5", 1e9, 1e308, 2**63, 10**400, (),
)  # fmt: skip
"""Values that look like seconds; none of them expires soon."""


class Input(NamedTuple):
    """A call to a store."""

    name: str
    arguments: Mapping[str, Any]
    run: Callable[[], Any]
    """Returns the result, or an awaitable of it."""
    is_large: bool
    """True if a value is so large that the store is replaced afterwards."""


class Outcome(NamedTuple):
    """The outcome of a call."""

    text: str
    """A text that is the same for both stores."""
    error: Exception | None = None


WAITS = Outcome("waits")
"""The outcome of a call that was cancelled while it waited."""


class Method(NamedTuple):
    """A public method and its parameters."""

    kind: type[Any]
    name: str
    hints: dict[str, Any]
    """Annotations of the parameters, without the optional ones."""
    optional: frozenset[str]

    @property
    def full_name(self) -> str:
        return f"{self.kind.__name__}.{self.name}"


def methods() -> list[Method]:
    """Return the methods to call, and repeat the methods that take a task or node."""
    found = []
    for kind in (StateManager, TaskRepository, NodeRepository, Database):
        for name, function in inspect.getmembers(kind, inspect.isfunction):
            method = _method(kind, name, function)
            if not name.startswith("_") and method.full_name not in NOT_CALLED:
                weight = 12 if {Task, NodeInfo} & set(method.hints.values()) else 4
                found += [method] * (1 if method.full_name in WAITING_CALLS else weight)
    return found


def _method(kind: type[Any], name: str, function: Callable[..., Any]) -> Method:
    hints = hints_of(function)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls") and parameter.kind is not parameter.VAR_KEYWORD
    }
    of_kind = getattr(kind, "kind", None)
    return Method(
        kind,
        name,
        {
            name: of_kind if type(hints[name]).__name__ == "TypeVar" else hints[name]
            for name in parameters
        },
        frozenset(
            name
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty and hints[name] is not Backoff
        ),
    )


class PairedStore:
    """A store of one kind, and the objects that its caller has."""

    def __init__(self, location: Location, folder: Path, client: SecondClient) -> None:
        self.location, self.folder, self.client = location, folder, client
        self.clock = FakeClock()
        self.tasks: list[Task] = []
        self.nodes: list[NodeInfo] = []
        self.manager = self.new_manager()
        self.mark: object = None
        self.rows: object = None

    @property
    def database(self) -> Database:
        return self.manager.db

    def new_manager(self) -> StateManager:
        """Return a manager without background work and random choices."""
        database = Database(self.location, clock=self.clock)
        return StateManager(database, None, backoff=Backoff(jitter=0))

    async def fill(self) -> None:
        """Add missing rows for the calls."""
        manager = self.manager
        for number in range(1, 4):
            node = NodeInfo(f"node-{number}", f"host-{number}", available_skills=["python"])
            if await manager.get_node(node.node_id) is None:
                await manager.register_node(node)
                self.nodes.append(node)
        for number in range(1, 6):
            task = Task(f"task-{number}", TaskType.BATCH, "x", submitted_at=self.clock())
            if await manager.get_task(task.task_id) is None:
                await manager.add_task(task)
                self.tasks.append(task)
        self.tasks += await manager.claim_tasks("node-1", limit=2)
        del self.tasks[:-12], self.nodes[:-6]

    async def attempt(self, call: Input) -> Outcome:
        """Make a call."""
        limit = WAIT_SECONDS if call.name in WAITING_CALLS else 60
        try:
            async with asyncio.timeout(limit) as timer:
                result = call.run()
                if inspect.isasyncgen(result):
                    async with contextlib.aclosing(result):
                        result = await anext(result, None)
                elif inspect.isawaitable(result):
                    result = await result
                if "persist" in call.arguments or call.name.endswith("update_heartbeat"):
                    await self.manager.sync_to_database()
        except TimeoutError:
            if not timer.expired():
                raise
            return WAITS
        except Exception as error:  # every error is judged
            return Outcome(self.shown(f"{type(error).__name__}: {error}"), error)
        if isinstance(result, list) and "claim" in call.name:
            self.tasks += result
        if ".list_by_" in call.name:
            # The order of tasks of one moment is undefined, also within a limit.
            result = [vars(item).get("submitted_at", item) for item in result]
        try:
            text = repr(result)
        except ValueError as error:  # a number with too many digits for Python to show
            text = str(error)
        return Outcome(self.shown(text))

    def shown(self, text: str) -> str:
        """Return a text without store-specific parts: paths, and versions only in memory."""
        text = text.replace(str(self.folder), "(folder)").replace(str(self.location), "(location)")
        text = re.sub(r"\b0x[0-9a-f]{6,}|(?<=version[ =])-\d+|(?<='version': )-\d+", "…", text)
        return text if len(text) < 10_000 else f"{text[:500]}… {len(text)} {hash(text)}"

    async def note_rows(self) -> bool:
        """Record the rows as they are now; true if they are unchanged."""
        mark = await self.client.mark()
        if mark == self.mark:
            return True
        queries = [f"SELECT * FROM {table} ORDER BY 1" for table in TABLES]
        before, self.mark = self.rows, mark
        self.rows = [await self.client.fetch(query) for query in queries]
        return self.rows == before

    async def contents(self) -> list[str]:
        """Return all content that a new manager reads, and the feed."""
        texts = []
        async with self.new_manager() as manager:
            state = await manager.get_state()
            texts += [repr(dict(state.tasks)), repr(dict(state.nodes)), repr(state.total_tasks)]
            after = None
            while True:
                page = await manager.list_tasks(after=after)
                texts += map(repr, page)
                after = page.after
                if after is None:
                    break
            texts += map(repr, await manager.get_all_nodes())
            for status in TaskStatus:
                texts += sorted(map(repr, await manager.task_repo.list_by_status(status)))
        return texts


class Drawing:
    """Draws a call to a store."""

    def __init__(
        self, store: PairedStore, known: Sequence[Method], random: Random, number: int
    ) -> None:
        self._store, self._known, self._random = store, known, random
        self._values = Values(random, store.tasks, store.nodes)
        self._place = f"{store.folder}/{number}/a/b/c/d/e"  # deep enough for all relative paths

    def draw(self) -> Input:
        chosen = self._random.random()
        if chosen < 0.9:
            name, arguments, run = self._of_method(self._random.choice(self._known))
        elif chosen < 0.96:
            name, arguments, run = self._of_function()
        else:
            name, arguments, run = self._of_place()
        return Input(name, arguments, run, self._values.is_large)

    def _arguments(self, method: Method) -> dict[str, Any]:
        """Draw arguments, mostly with one odd value, so that only that one can be refused."""
        values, random = self._values, self._random
        odd = random.choice([*method.hints, None]) if random.random() < 0.9 else None
        return {
            name: values.of(hint)
            if name == odd or random.random() < 0.1
            else values.usual(name, hint)
            for name, hint in method.hints.items()
            if name == odd or name not in method.optional or random.random() < 0.5
        }

    def _of_method(self, method: Method) -> tuple[str, Mapping[str, Any], Callable[[], Any]]:
        arguments, manager = self._arguments(method), self._store.manager
        if method.kind is StateManager:
            owner: Any = manager
        elif self._random.random() < 0.3:
            return (
                f"{method.full_name} in a transaction",
                arguments,
                lambda: self._in_transaction(method, arguments),
            )
        else:
            owner = manager.task_repo if method.kind is TaskRepository else manager.node_repo
        return method.full_name, arguments, lambda: getattr(owner, method.name)(**arguments)

    async def _in_transaction(self, method: Method, arguments: Mapping[str, Any]) -> Any:
        async with self._store.database.transaction() as tx:
            options = (Backoff(jitter=0),) if method.kind is TaskRepository else ()
            result = getattr(method.kind(tx, *options), method.name)(**arguments)
            return await result if inspect.isawaitable(result) else result

    def _of_function(self) -> tuple[str, Mapping[str, Any], Callable[[], Any]]:
        values, random = self._values, self._random
        chosen = random.randrange(7)
        if chosen < 2:
            item = random.choice((values.task, values.node))()
            name = type(item).__name__
            if chosen == 0:
                return f"{name}.to_dict", {"item": item}, item.to_dict
            data = random.choice((vars(item), vars(item), values.json_object()))
            return f"{name}.from_dict", {"data": data}, lambda: type(item).from_dict(data)
        if chosen == 2:
            method = _method(Task, "create", Task.create)
            arguments = {
                **self._arguments(method),
                "task_id": "t",
                "submitted_at": self._store.clock(),
            }
            return method.full_name, arguments, lambda: Task.create(**arguments)
        if chosen == 3:
            arguments = values.some(Backoff)
            return "Backoff", arguments, lambda: Backoff(**arguments).seconds(3, 0.5)
        kind: type[Any] = StateManager if chosen == 4 else Database
        method = _method(kind, "__init__", kind.__init__)
        for own in {"database", "db_path", "clock"} & method.hints.keys():
            del method.hints[own]
        arguments = self._arguments(method)
        where = self._store.database if kind is StateManager else self._store.location
        return kind.__name__, arguments, lambda: repr(type(kind(where, **arguments)))

    def _of_place(self) -> tuple[str, Mapping[str, Any], Callable[[], Any]]:
        chosen = self._random.randrange(8)
        database = self._store.database
        path: Any = f"{self._place}/{self._values.path()}"
        if self._random.random() < 0.3:
            path = Path(path)
        if chosen == 0:
            return "Database.backup", {"path": path}, lambda: database.backup(path)
        if chosen == 1:
            limit = self._random.choice(LIMITS)
            return "Database.transaction", {"timeout": limit}, lambda: self._read_within(limit)
        if chosen < 5:
            location = self._random.choice(LOCATIONS)
            return "Database", {"db_path": location}, lambda: repr(type(Database(location)))
        return "Database, opened,", {"db_path": path}, lambda: self._open(path)

    async def _read_within(self, limit: Any) -> Any:
        async with self._store.database.transaction(timeout=limit) as tx:
            return await TaskRepository(tx).get("task-1")

    async def _open(self, path: Any) -> None:
        async with Database(path) as database:
            await TaskRepository(database).create(Task("t", TaskType.BATCH, "x"))
