"""The examples, run as a newcomer runs them."""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from conftest import Location
from support.scripts import RUN_FILE, run_scripts

from openclaw_store import NodeInfo, Task, TaskStatus, TaskType

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "storage_demo.py"
SCHEDULER = ROOT / "examples" / "scheduler_demo.py"
COORDINATORS = ROOT / "examples" / "two_coordinators.py"
REPLAY = ROOT / "examples" / "replay_trace.py"

HEADER = "; Version: 2.2\n; Computer: Abacus\n; UnixStartTime: 749458803\n;\n"
START = 749458803


def run(script: Path, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in an interpreter of its own, with `folder` for its temporary files."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment(folder)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def run_fork(script: Path, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Do the same in less time, in a fork of an interpreter that has imported the library."""
    scripts = RUN_FILE, [script, *arguments]
    (ended,) = run_scripts(scripts, folder=folder, environment=environment(folder))
    return subprocess.CompletedProcess([], ended.code, "\n".join(ended.out), ended.err)


def environment(folder: Path) -> dict[str, str]:
    return {"TMPDIR": str(folder), "COLUMNS": "120"}


def job_line(
    number: int,
    submit: float = 0,
    *,
    wait: float = -1,
    run: float = 60,
    processors: int = 4,
    status: int = 1,
    user: int = 7,
    application: int = 3,
) -> str:
    return (
        f"{number} {submit} {wait} {run} {processors} -1 -1 {processors} -1 -1 "
        f"{status} {user} 1 {application} -1 -1 -1 -1\n"
    )


def write_trace(path: Path, lines: Iterable[str]) -> Path:
    text = HEADER + "".join(lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows(database: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


class TestTwoCoordinators:
    @pytest.mark.usefixtures("migrated")
    def test_both_end_with_one_history(self, location: Location, tmp_path: Path) -> None:
        done = run_fork(COORDINATORS, location, folder=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"^100 tasks, finished by {'(left|right)'", done.stdout)
        assert "200 changes were seen, with the revisions 1 to 200" in done.stdout

    def test_unusable_location_ends_with_one_line(self, tmp_path: Path) -> None:
        done = run_fork(COORDINATORS, "mysql://localhost/cluster", folder=tmp_path)

        assert done.returncode == 1
        assert "mysql is not supported" in done.stderr
        assert "Traceback" not in done.stderr


class TestSchedulerDemo:
    @pytest.mark.usefixtures("migrated")
    def test_every_task_is_done_though_a_worker_is_killed(
        self, location: Location, tmp_path: Path
    ) -> None:
        done = run_fork(SCHEDULER, location, folder=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        [name] = re.findall(r"^(\w+) runs task-15, and is killed$", done.stdout, re.MULTILINE)
        assert f"{name} was silent for more than 3 seconds" in done.stdout
        assert re.search(r"^task-15 is pending again$", done.stdout, re.MULTILINE)
        assert "30 of 30 tasks are completed" in done.stdout
        counts = re.findall(r"^(\w+) +(\d+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
        assert [name for name, *_ in counts] == ["atlas", "boreas", "ceres"]
        assert sum(int(completed) for _, _, completed, _ in counts) == 30
        assert re.search(r"^ +\d+ pending \(node lost\)$", done.stdout, re.MULTILINE)

    def test_unusable_location_ends_with_one_line(self, tmp_path: Path) -> None:
        done = run_fork(SCHEDULER, "mysql://localhost/cluster", folder=tmp_path)

        assert done.returncode == 1
        assert "mysql is not supported" in done.stderr
        assert "Traceback" not in done.stderr


class TestStorageDemo:
    def test_demo_shows_all_eight_steps_and_leaves_nothing_behind(self, tmp_path: Path) -> None:
        done = run(DEMO, folder=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        assert re.findall(r"^(\d) [A-Z]", done.stdout, re.MULTILINE) == list("12345678")
        assert "ceres was silent for more than 120 seconds" in done.stdout
        assert re.search(r"^render the film .* pending +node lost$", done.stdout, re.MULTILINE)
        assert list(tmp_path.iterdir()) == []

    def test_kept_database_holds_what_the_demo_showed(self, tmp_path: Path) -> None:
        path = tmp_path / "kept" / "cluster.db"

        done = run_fork(DEMO, "--keep", path, folder=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        assert rows(path, "SELECT status, count(*) FROM tasks GROUP BY 1 ORDER BY 1") == [
            ("completed", 3),
            ("failed", 1),
            ("pending", 2),
        ]
        assert rows(path, "SELECT node_id FROM nodes WHERE status = 'offline'") == [("ceres",)]
        assert [entry.name for entry in path.parent.iterdir()] == ["cluster.db"]

    def test_demo_does_not_touch_a_file_that_exists(self, tmp_path: Path) -> None:
        path = tmp_path / "precious.db"
        path.write_text("precious")

        done = run_fork(DEMO, "--keep", path, folder=tmp_path)

        assert done.returncode == 2
        assert "exists already" in done.stderr
        assert path.read_text() == "precious"


class TestReplayTrace:
    @pytest.mark.parametrize("name", ["trace.swf", "trace.swf.gz"])
    def test_replay_proves_that_every_job_is_stored(self, tmp_path: Path, name: str) -> None:
        # Forty a minute apart, two weeks later one that lasts three hours.
        lines = [job_line(n, n * 60, run=n * 5, user=n % 3) for n in range(1, 41)]
        trace = write_trace(tmp_path / name, [*lines, job_line(41, 1_300_000, run=10_800)])

        done = run_fork(REPLAY, trace, "--nodes", 4, folder=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        assert "41 of 41 jobs of the log are in the database" in done.stdout
        assert "41 of 41 jobs have the log's times" in done.stdout
        assert "4 of 4 nodes have counters that add up" in done.stdout
        assert re.findall(r"^(1993-\d\d-\d\d) +(\d+)", done.stdout, re.MULTILINE) == [
            ("1993-10-01", "40"),
            ("1993-10-08", "0"),
            ("1993-10-15", "1"),
        ]
        assert list(tmp_path.iterdir()) == [trace]

    def test_replay_stores_the_times_and_the_outcome_of_each_job(self, tmp_path: Path) -> None:
        lines = [
            job_line(1, 10, wait=5, run=100, user=8),
            job_line(2, 20, run=-1, status=0, user=-1, processors=-1, application=-1),
            job_line(3, 30, wait=7200, run=-1, status=5),
            job_line(4, 40, run=50, status=5),
            job_line(5, 50, run=0, status=-1),
        ]
        trace = write_trace(tmp_path / "trace.swf", lines)
        database = tmp_path / "replay.db"

        done = run_fork(REPLAY, trace, "--nodes", 2, "--database", database, folder=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        query = (
            "SELECT task_id, status, submitted_at / 1000000, started_at / 1000000,"
            " completed_at / 1000000, user_id FROM tasks ORDER BY task_id"
        )
        assert rows(database, query) == [
            ("job-1", "completed", START + 10, START + 15, START + 115, "user-8"),
            ("job-2", "failed", START + 20, START + 20, START + 20, None),
            ("job-3", "cancelled", START + 30, None, START + 7230, "user-7"),
            ("job-4", "cancelled", START + 40, START + 40, START + 90, "user-7"),
            ("job-5", "completed", START + 50, START + 50, START + 50, "user-7"),
        ]
        counters = "SELECT sum(total_tasks_processed), sum(successful_tasks), sum(failed_tasks)"
        assert rows(database, f"{counters} FROM nodes") == [(3, 2, 1)]

    def test_job_that_starts_at_the_end_of_a_window_belongs_to_it(self, tmp_path: Path) -> None:
        hours = 3600
        lines = [
            job_line(1, 0, wait=6 * hours),  # as long as it can within the window
            job_line(2, 10, wait=6 * hours - 9),  # and a second longer
            job_line(3, 20),
            job_line(4, 30, wait=50 * hours),
            job_line(5, 12 * hours),
        ]
        trace = write_trace(tmp_path / "trace.swf", lines)

        done = run_fork(REPLAY, trace, "--nodes", 1, folder=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        assert "5 of 5 jobs have the log's times" in done.stdout

    def test_one_node_has_slots_for_all_jobs_of_a_window(self, tmp_path: Path) -> None:
        trace = write_trace(tmp_path / "trace.swf", [job_line(n, n) for n in range(1, 31)])

        done = run_fork(REPLAY, trace, "--nodes", 1, folder=tmp_path)

        assert done.returncode == 0
        assert "1 with 30 slots each" in done.stdout

    def test_limit_takes_the_first_jobs(self, tmp_path: Path) -> None:
        lines = [job_line(1), job_line(2), "nobody reads this far\n"]
        trace = write_trace(tmp_path / "trace.swf", lines)

        done = run_fork(REPLAY, trace, "--limit", 2, folder=tmp_path)

        assert done.returncode == 0
        assert "2 of 2 jobs of the log are in the database" in done.stdout

    def test_unreadable_log_ends_with_one_line_and_status_2(self, tmp_path: Path) -> None:
        trace = write_trace(tmp_path / "trace.swf", [job_line(1), "2 0 -1 60\n"])

        done = run_fork(REPLAY, trace, folder=tmp_path)

        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"replay_trace.py: {trace}: line 6: 4 fields instead of 18\n"
        assert list(tmp_path.iterdir()) == [trace]

    def test_unusable_database_ends_with_one_line_and_status_2(self, tmp_path: Path) -> None:
        trace = write_trace(tmp_path / "trace.swf", [job_line(1)])

        done = run_fork(REPLAY, trace, "--database", trace, folder=tmp_path)

        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1

    def test_database_in_use_is_left_alone(self, tmp_path: Path) -> None:
        trace = write_trace(tmp_path / "trace.swf", [job_line(1)])
        database = tmp_path / "replay.db"
        run_fork(REPLAY, trace, "--database", database, "--nodes", 1, folder=tmp_path)

        done = run_fork(REPLAY, trace, "--database", database, "--nodes", 1, folder=tmp_path)

        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "is not empty" in done.stderr
        assert rows(database, "SELECT count(*) FROM nodes") == [(1,)]


@pytest.fixture(scope="module")
def replay_trace() -> ModuleType:
    """The example as a module, though it is not part of a package."""
    spec = importlib.util.spec_from_file_location("replay_trace", REPLAY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


class TestReadTrace:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("2 0 -1 60\n", "4 fields instead of 18"),
            (job_line(2).replace("60", "long"), "could not convert string to float: 'long'"),
            (job_line(2, submit=-1), "job 2 has no submit time"),
            (job_line(2, run=float("inf")), "infinity"),
            (job_line(1), "job 1 is on line 5 already"),
            ("; UnixStartTime: yesterday\n", "yesterday"),
        ],
        ids=["short", "not a number", "no submit time", "infinite", "twice", "header"],
    )
    def test_malformed_line_is_named(
        self, replay_trace: ModuleType, tmp_path: Path, line: str, reason: str
    ) -> None:
        trace = write_trace(tmp_path / "trace.swf", [job_line(1), line])

        with pytest.raises(replay_trace.TraceError) as caught:
            list(replay_trace.read_trace(trace))

        assert str(caught.value).startswith(f"{trace}: line 6: ")
        assert reason in str(caught.value)

    @pytest.mark.parametrize(
        "content",
        [None, b"not gzip", gzip.compress(b"x" * 9999)[:-9]],
        ids=["missing", "not gzip", "cut off"],
    )
    def test_unreadable_log_is_named(
        self, replay_trace: ModuleType, tmp_path: Path, content: bytes | None
    ) -> None:
        trace = tmp_path / "trace.swf.gz"
        if content is not None:
            trace.write_bytes(content)

        with pytest.raises(replay_trace.TraceError, match="after line 0: "):
            list(replay_trace.read_trace(trace))

    def test_log_without_start_time_begins_in_1970(
        self, replay_trace: ModuleType, tmp_path: Path
    ) -> None:
        trace = tmp_path / "trace.swf"
        trace.write_text(job_line(1, 86_400))

        [job] = replay_trace.read_trace(trace)

        assert job.submitted_at == datetime(1970, 1, 2, tzinfo=UTC)

    def test_lines_on_parts_of_a_job_are_not_jobs(
        self, replay_trace: ModuleType, tmp_path: Path
    ) -> None:
        parts = [job_line(1, run=30, status=2), job_line(1, 30, run=30, status=3)]
        trace = write_trace(tmp_path / "trace.swf", [job_line(1), *parts])

        [job] = replay_trace.read_trace(trace)

        assert job.run_seconds == 60


Tamper = Callable[[list[Task], NodeInfo], object]


class TestProof:
    """What the replay compares in the end; each damage to the database must be noticed."""

    def proves(self, module: ModuleType, path: Path, tamper: Tamper) -> bool:
        """Whether the proof succeeds for two jobs in a database that was tampered with.

        By the simulated clock, one of them lasted six hours, and one eighteen.
        """
        lines = [job_line(1, run=3600), job_line(2, run=50_000, status=0)]
        trace = write_trace(path / "trace.swf", lines)
        jobs = list(module.read_trace(trace))
        tasks = [
            Task(
                task_id=job.task_id,
                task_type=TaskType.BATCH,
                name="",
                status=job.status,
                assigned_node="node-001",
                submitted_at=job.submitted_at,
                scheduled_at=job.started_at,
                started_at=job.started_at,
                completed_at=job.completed_at,
                user_id=job.user,
                parameters=job.parameters,
            )
            for job in jobs
        ]
        node = NodeInfo(
            node_id="node-001",
            hostname="",
            total_tasks_processed=2,
            successful_tasks=1,
            failed_tasks=1,
            average_execution_time=43_200.0,
        )
        tamper(tasks, node)
        claims = module.proof(jobs, tasks, [node])
        return all(claim.holds_for == claim.total for claim in claims)

    def test_proof_succeeds_for_the_log(self, replay_trace: ModuleType, tmp_path: Path) -> None:
        assert self.proves(replay_trace, tmp_path, lambda tasks, node: None)

    @pytest.mark.parametrize(
        "tamper",
        [
            lambda tasks, node: tasks.pop(),
            lambda tasks, node: tasks.append(Task("other", TaskType.BATCH, "")),
            lambda tasks, node: setattr(tasks[0], "status", TaskStatus.RUNNING),
            lambda tasks, node: setattr(
                tasks[0], "completed_at", tasks[0].completed_at + timedelta(microseconds=1)
            ),
            lambda tasks, node: setattr(tasks[0], "started_at", None),
            lambda tasks, node: setattr(tasks[0], "user_id", "user-8"),
            lambda tasks, node: tasks[0].parameters.update(processors=5),
            lambda tasks, node: setattr(tasks[0], "assigned_node", "node-002"),
            lambda tasks, node: setattr(node, "running_tasks", 1),
            lambda tasks, node: setattr(node, "total_tasks_processed", 3),
            lambda tasks, node: setattr(node, "successful_tasks", 2),
            lambda tasks, node: setattr(node, "failed_tasks", 0),
            lambda tasks, node: setattr(node, "average_execution_time", 43_199.9),
        ],
    )
    def test_proof_fails_for_a_damaged_database(
        self, replay_trace: ModuleType, tmp_path: Path, tamper: Tamper
    ) -> None:
        assert not self.proves(replay_trace, tmp_path, tamper)
