"""The benchmarks, run as quickly as possible: each gives its figures, whatever their values."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import BrokenBarrierError

import pytest
from conftest import require_server

import benchmarks.claims
import benchmarks.lives
import benchmarks.processes
from benchmarks import cpu
from benchmarks.__main__ import main
from benchmarks.catalogue import BENCHMARKS, GROUPS
from benchmarks.comparison import ROOT, TOLERANCE, compare, require_own_library
from benchmarks.measure import Samples, at_least, at_most, percentile
from benchmarks.processes import processes, start_together, take_item
from benchmarks.report import Machine, Report, Result
from benchmarks.work import connected, require_durable_server
from devtools.postgres import Server, is_installed, wait_until

NAMES = [benchmark.name for benchmark in BENCHMARKS]
ON_SERVER = [benchmark.name for benchmark in BENCHMARKS if benchmark.needs_server]
AT_ONCE = ["--quick", "--quick", "--rounds", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_gives_a_figure_for_each_of_its_lines(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (benchmarks.lives, benchmarks.processes):
        monkeypatch.setattr(module, "COORDINATORS", 2)  # several processes, and no more
    monkeypatch.setattr(benchmarks.claims, "CLAIMERS", 4)  # of SQLite, each is a process
    file, table = tmp_path / "figures.json", tmp_path / "figures.md"
    folder = tmp_path / "databases"
    folder.mkdir()
    server: list[str] = []
    if name in ON_SERVER:
        server = ["--server", request.getfixturevalue("server").url]

    main(
        [
            *AT_ONCE,
            *server,
            "--only",
            name,
            "--json",
            str(file),
            "--markdown",
            str(table),
            "--folder",
            str(folder),
        ]
    )

    report = json.loads(file.read_text(encoding="utf-8"))
    [(found, measured)] = report["benchmarks"].items()
    [benchmark] = [benchmark for benchmark in BENCHMARKS if benchmark.name == name]
    assert found == name
    assert [figure["what"] for figure in measured["figures"]] == [
        line.text for line in benchmark.lines
    ]
    assert all(
        "skipped" in figure or math.isfinite(figure["value"]) for figure in measured["figures"]
    )
    assert all(
        len(values) == 1 and math.isfinite(values[0])
        for contender in measured["samples"].values()
        for values in contender.values()
    )
    rows = [row.strip("| ").split(" | ") for row in table.read_text(encoding="utf-8").splitlines()]
    assert [row[0] for row in rows[4:]] == [line.text for line in benchmark.lines]
    assert list(folder.iterdir()) == []
    assert report["machine"]["python"] in capsys.readouterr().out


def test_server_of_its_own_runs_in_the_folder_and_is_said_to_be_durable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    require_server(there=is_installed())
    with TemporaryDirectory() as folder:  # the user of the server cannot reach `tmp_path`
        Path(folder).chmod(0o711)

        main([*AT_ONCE, "--only", "pg-insert-1", "--folder", folder])

        assert list(Path(folder).iterdir()) == []
    said = capsys.readouterr().out
    assert re.search(r"PostgreSQL \d+\.\d+,", said)
    assert "fsync=on, synchronous_commit=on" in said


def test_without_a_server_its_benchmarks_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    monkeypatch.setattr("benchmarks.__main__.is_installed", lambda: False)

    main([*AT_ONCE, "--only", *ON_SERVER, "--json", str(file)])

    benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    assert set(benchmarks) == set(ON_SERVER)
    reasons = [figure["skipped"] for found in benchmarks.values() for figure in found["figures"]]
    assert all("pip install" in reason for reason in reasons)
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fsync", "synchronous_commit"])
async def test_server_that_does_not_wait_for_the_disk_is_refused(name: str) -> None:
    class Connection:
        async def fetchval(self, query: str) -> str:
            return "off" if query == f"SHOW {name}" else "on"

    with pytest.raises(RuntimeError, match=f"{name}=off"):
        await require_durable_server(Connection())


def test_group_runs_each_of_its_benchmarks_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert set(GROUPS["processes"]) < set(NAMES)
    monkeypatch.setitem(GROUPS, "processes", ("get-task", "insert-1"))
    file = tmp_path / "figures.json"

    main([*AT_ONCE, "--only", "insert-1", "processes", "--json", str(file)])

    benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    assert sorted(benchmarks) == ["get-task", "insert-1"]


def test_unknown_benchmark_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "sorting"])

    refusal = capsys.readouterr().err
    assert all(name in refusal for name in NAMES)


def test_plot_without_its_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "memory", "--plot", "figures.png"])

    assert "insert-64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "large", "small"),
    [
        (3.9, "missed", "reached"),
        (4, "must", "reached"),
        (5, "must", "must"),
        (8, "reached", "missed"),
    ],
)
def test_verdict_names_the_better_goal_that_holds(value: float, large: str, small: str) -> None:
    assert at_least(4, 8).verdict(value) == large
    assert at_most(5, 4).verdict(value) == small


def test_goal_without_an_aim_is_reached_or_missed() -> None:
    assert at_most(5).verdict(5) == "reached"
    assert at_most(5).verdict(5.1) == "missed"


def test_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([7], 0.01) == 7


def test_plot_is_drawn(tmp_path: Path) -> None:
    [benchmark] = [benchmark for benchmark in BENCHMARKS if benchmark.name == "insert-64"]
    rates = {"sqlite3": 2000.0, "openclaw_store": 12_000.0, "aiosqlite": 1200.0}
    samples = {name: {"per_s": [rate, rate, 0.0]} for name, rate in rates.items()}
    report = Report(Machine.here(tmp_path), 3, 1, [Result(benchmark, [], samples)])

    report.plot(tmp_path / "figures.png")

    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


class TestProcesses:
    """Processes that share the work of a benchmark."""

    async def test_each_item_is_taken_once(self) -> None:
        async with processes(2, 101) as run:
            assert sum(await asyncio.gather(*(run(_take_all) for _ in range(2)))) == 101

    async def test_failure_ends_the_wait_of_the_other_processes(self) -> None:
        async with processes(2) as run:
            waiting, failing = await asyncio.gather(
                run(_wait_for_the_others), run(_fail), return_exceptions=True
            )

        assert isinstance(waiting, BrokenBarrierError)
        assert isinstance(failing, ZeroDivisionError)


async def _take_all() -> int:
    await asyncio.to_thread(start_together)
    return sum(iter(take_item, False))


async def _wait_for_the_others() -> None:
    await asyncio.to_thread(start_together)


async def _fail() -> None:
    raise ZeroDivisionError


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
async def test_cpu_time_of_a_server_contains_ended_sessions(own_server: Server) -> None:
    postmaster = await cpu.find_postmaster(own_server.url)
    before = cpu.of_server(postmaster)

    async with connected(own_server.url) as connection:
        session = await connection.fetchval("SELECT pg_backend_pid()")
        await connection.fetchval("SELECT count(*) FROM generate_series(1, 1000000)")
        during = cpu.of_server(postmaster)
    wait_until(lambda: not Path(f"/proc/{session}").exists(), "the session ended")

    assert before + 0.03 <= during <= cpu.of_server(postmaster)


class TestComparison:
    """`--against`, with a measurement that runs nothing."""

    BEFORE, NOW = Path("before"), Path("now")

    def test_checkouts_are_measured_in_turns(self) -> None:
        measured: list[tuple[str, str]] = []

        def measure(checkout: Path, name: str) -> Samples:
            measured.append((name, checkout.name))
            return {}

        compare(self.BEFORE, self.NOW, ["a", "b"], 2, measure)

        turns = ["before", "now", "now", "before"]
        assert measured == [*(("a", turn) for turn in turns), *(("b", turn) for turn in turns)]

    def test_medians_of_the_library_are_compared(self) -> None:
        rounds = {self.BEFORE: iter([100.0, 300.0, 110.0]), self.NOW: iter([95.0, 100.0, 10.0])}

        def measure(checkout: Path, name: str) -> Samples:
            value = next(rounds[checkout])
            ours = {"per_s": [value], "p50_ms": [value]}
            return {"openclaw_store": ours, "sqlite3": {"per_s": [1.0]}}

        rate, latency = compare(self.BEFORE, self.NOW, ["insert-1"], 3, measure)

        assert (rate.contender, rate.quantity) == ("openclaw_store", "per_s")
        assert rate.ratio == pytest.approx(110 / 95)
        assert rate.ratio > TOLERANCE
        assert latency.quantity == "p50_ms"
        assert latency.ratio == pytest.approx(95 / 110)
        assert latency.ratios == pytest.approx([95 / 100, 100 / 300, 10 / 110])

    def test_figure_of_one_commit_alone_is_left_out(self) -> None:
        def measure(checkout: Path, name: str) -> Samples:
            return {"openclaw_store": {"old_us" if checkout == self.BEFORE else "us": [1.0]}}

        assert compare(self.BEFORE, self.NOW, ["get-task"], 1, measure) == []

    def test_checkout_is_measured_with_its_own_library(self, tmp_path: Path) -> None:
        require_own_library(ROOT)
        with pytest.raises(RuntimeError, match="would be measured with the library in"):
            require_own_library(tmp_path)

    def test_unknown_commit_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--against", "no-such-commit", "--only", "memory"]) == 1

        assert "no-such-commit" in capsys.readouterr().out
