"""Metrics: what a commit and a database are worth in figures, for OpenTelemetry and Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeClock, Location, MakeNode, MakeTask
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families
from support.pages import ROOT
from typer.testing import CliRunner

from openclaw_store import (
    Database,
    DuplicateError,
    NodeRepository,
    StateManager,
    TaskRepository,
    UnavailableError,
)
from openclaw_store.cli import metrics as _metrics  # noqa: F401 - it adds the command
from openclaw_store.cli.commands import app
from openclaw_store.observability import METRICS, Kind, instrument
from openclaw_store.observability.prometheus import PrometheusExporter

DOCS = ROOT / "docs" / "observability"


async def live_a_little(
    manager: StateManager, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
) -> None:
    """Four tasks: one completed, one failed, one stuck, one waiting; and one refused."""
    await manager.register_node(make_node(node_id="atlas", max_concurrent_tasks=2))
    tasks = [make_task(task_id=f"t{number}", max_retries=0) for number in range(2)]
    await manager.add_tasks([*tasks, make_task(task_id="odd", required_skills=["quantum"])])
    clock.advance(seconds=30)
    claimed = await manager.claim_tasks("atlas", 2)
    for task in claimed:
        await manager.start_task(task)
    clock.advance(seconds=90)
    await manager.complete_task(await started(manager, "t0"))
    await manager.fail_task(await started(manager, "t1"), "no paper")
    await manager.add_task(make_task(task_id="waits"))
    with pytest.raises(DuplicateError):
        await manager.add_task(make_task(task_id="waits"))


async def started(manager: StateManager, task_id: str) -> Any:
    return await manager.get_task(task_id)


EXPECTED: Mapping[str, object] = {
    "openclaw.store.task.submitted": {"": 4},
    "openclaw.store.task.claimed": {"": 2},
    "openclaw.store.task.finished": {"completed": 1, "failed": 1},
    "openclaw.store.operation.refusals": {"DuplicateError": 1},
    "openclaw.store.task.waiting_time": (2, 60.0),
    "openclaw.store.task.running_time": (2, 180.0),
    "openclaw.store.commit.failures": {"": 0},
    "openclaw.store.writer.connections": {"": 1},
    "openclaw.store.writer.queue": {"": 0},
    "openclaw.store.feed.lag": {"": 0},
}


def of_otel(reader: InMemoryMetricReader) -> dict[str, Any]:
    """The values by name and attribute; of a histogram the count and the sum."""
    found: dict[str, Any] = {}
    data: Any = reader.get_metrics_data()
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            if hasattr(point, "sum"):
                found[metric.name] = point.count, point.sum
            else:
                attribute = "".join(map(str, point.attributes.values()))
                found.setdefault(metric.name, {})[attribute] = point.value
    return found


def of_prometheus(text: str) -> dict[str, Any]:
    """The same of a text, by the names of the catalogue."""
    names = {one.prometheus_name: one for one in METRICS}
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        metric = names.get(family.name)
        if metric is None or family.type != str(metric.kind):
            assert family.name.endswith("_created"), family.name
            continue
        values = found.setdefault(metric.name, {})
        for sample in family.samples:
            kind = sample.name.removeprefix(family.name)
            if metric.kind is Kind.HISTOGRAM:
                values[kind] = sample.value
            elif kind in ("", "_total"):
                values["".join(sample.labels.values())] = sample.value
        if metric.kind is Kind.HISTOGRAM:
            found[metric.name] = int(values["_count"]), values["_sum"]
    return found


class TestOpenTelemetry:
    async def test_each_metric_has_its_value(
        self, database: Database, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        instrumentation = instrument(database, meter_provider=provider)
        async with StateManager(database, None) as manager:
            await live_a_little(manager, clock, make_task, make_node)
            found = of_otel(reader)
            instrumentation.remove()
            await manager.add_task(make_task())
            after = of_otel(reader)
        provider.shutdown()

        assert {name: found.get(name) for name in EXPECTED} == EXPECTED
        assert found.keys() == {one.name for one in METRICS}
        check_present(found)
        assert after["openclaw.store.task.submitted"] == {"": 4}

    async def test_closed_database_leaves_the_figures_of_the_process(
        self, location: Location, make_task: MakeTask
    ) -> None:
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        database = Database(location)
        instrument(database, meter_provider=provider)

        found = of_otel(reader)
        provider.shutdown()

        assert found["openclaw.store.writer.queue"] == {"": 0}
        assert "openclaw.store.tasks" not in found
        await database.close()

    async def test_exporter_that_fails_harms_no_write(
        self, database: Database, make_task: MakeTask, caplog: pytest.LogCaptureFixture
    ) -> None:
        exporter = PrometheusExporter(database)
        exporter.note_commit = None  # type: ignore[assignment]  # a call of it fails

        async with StateManager(database, None) as manager:
            assert await manager.add_task(make_task(task_id="t"))

        assert "a commit could not be measured" in caplog.text

    async def test_repositories_in_a_transaction_are_measured(
        self, database: Database, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        instrument(database, meter_provider=provider)

        async with database.transaction() as tx:
            await NodeRepository(tx).register(make_node(node_id="atlas"))
            await TaskRepository(tx).create(make_task())
            await TaskRepository(tx).claim("atlas", 1)
        found = of_otel(reader)
        provider.shutdown()

        assert found["openclaw.store.task.submitted"] == {"": 1}
        assert found["openclaw.store.task.claimed"] == {"": 1}
        assert "openclaw.store.commit.duration" not in found


def check_present(found: Mapping[str, Any]) -> None:
    """The present values of the database, after `live_a_little`."""
    tasks = {name: n for name, n in found["openclaw.store.tasks"].items() if n}
    assert tasks == {"pending": 2, "completed": 1, "failed": 1}
    assert {name: n for name, n in found["openclaw.store.nodes"].items() if n} == {"online": 1}
    assert found["openclaw.store.tasks.oldest_waiting"][""] == 120
    stuck = {name: n for name, n in found["openclaw.store.tasks.stuck"].items() if n}
    assert stuck == {"no node has the skills": 1}
    assert found["openclaw.store.feed.revision"][""] > 10
    assert found["openclaw.store.database.size"][""] > 10_000


class TestPrometheus:
    async def test_text_has_each_metric(
        self, database: Database, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        exporter = PrometheusExporter(database)
        async with StateManager(database, None) as manager:
            await live_a_little(manager, clock, make_task, make_node)
            text = (await exporter.text()).decode()

        found = of_prometheus(text)
        assert {name: found.get(name) for name in EXPECTED} == EXPECTED
        assert found.keys() == {one.name for one in METRICS}
        check_present(found)

    async def test_command_prints_every_metric_of_an_empty_database(
        self, location: Location, database: Database
    ) -> None:
        def run(*options: str) -> Any:
            return CliRunner().invoke(app, ["-d", str(location), "metrics", *options])

        text, document = await asyncio.to_thread(run), await asyncio.to_thread(run, "--json")

        assert text.exit_code == 0
        assert of_prometheus(text.stdout).keys() == {one.name for one in METRICS}
        assert json.loads(document.stdout).keys() == {"text"}


@pytest.mark.sqlite
async def test_missing_package_is_named(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openclaw_store.observability.opentelemetry", None)

    with pytest.raises(UnavailableError, match=r"openclaw-store\[otel\]"):
        instrument(database)


@pytest.mark.sqlite
class TestDocuments:
    NAMES = re.compile(r"\bopenclaw_store_\w+")

    def known(self) -> set[str]:
        endings = {
            Kind.COUNTER: ("_total",),
            Kind.GAUGE: ("",),
            Kind.HISTOGRAM: ("_bucket", "_sum", "_count"),
        }
        return {one.prometheus_name + end for one in METRICS for end in endings[one.kind]}

    @pytest.mark.parametrize("name", ["grafana.json", "alerts.yml"])
    def test_dashboard_and_rules_use_names_that_exist(self, name: str) -> None:
        named = set(self.NAMES.findall((DOCS / name).read_text(encoding="utf-8")))

        assert len(named) > 5
        assert named - self.known() == set()

    def test_dashboard_shows_every_metric(self) -> None:
        board = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
        queries = " ".join(
            target["expr"] for panel in board["panels"] for target in panel.get("targets", [])
        )

        missing = [one.name for one in METRICS if one.prometheus_name not in queries]
        assert missing == []
        places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
        assert len(set(places)) == len(places)

    def test_each_rule_has_a_summary_and_what_to_do(self) -> None:
        text = (DOCS / "alerts.yml").read_text(encoding="utf-8")
        rules = text.split("- alert: ")[1:]

        assert len(rules) >= 6
        for rule in rules:
            for key in ("expr:", "for:", "severity:", "summary:", "description:"):
                assert key in rule, rule

    def test_table_of_the_reference_is_the_catalogue(self) -> None:
        text = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| `(openclaw\.store\.[\w.]+)` \| (.+) \|$", text, re.MULTILINE)

        listed = {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in rows}
        assert listed == {
            one.name: [
                one.kind.value,
                f"`{one.unit}`",
                f"`{one.attribute}`" if one.attribute else "—",
                "process" if one.is_of_process else "database",
                one.text,
            ]
            for one in METRICS
        }

    def test_no_attribute_is_an_identifier(self) -> None:
        assert {one.attribute for one in METRICS} == {"", "status", "reason", "error.type"}

    def test_library_loads_no_telemetry_by_itself(self, tmp_path: Path) -> None:
        code = (
            "import sys, openclaw_store; openclaw_store.Database(':memory:');"
            "print([n for n in sys.modules if n.startswith(('opentelemetry', 'prometheus'))])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

        assert done.stdout.strip() == "[]", done.stderr
