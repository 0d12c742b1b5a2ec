"""The Hypothesis state machines of the tests, run for longer than in the tests.

One machine drives two managers on one database against plain dictionaries, the other drives several
at the same time against a model of the life of a task. pytest runs both in a child process; a
failure is kept with its whole output, including the shortest steps to it. The tests themselves are
the short form.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from campaigns.harness.campaign import POSTGRESQL, Campaign, HangError, Run

MACHINES_A_CHILD = 100
"""Number of machines between two reports of progress."""

PATIENCE_SECONDS = 7200.0
"""Time limit, in seconds, of a child process."""

_PROJECT = Path(__file__).parents[2]
_TESTS = (
    "tests/state_manager/test_machine.py::test_two_managers_on_one_database_behave_as_dictionaries",
    "tests/state_manager/test_scheduler_machine.py::test_tasks_live_as_the_model_does",
)


def perform(run: Run) -> None:
    """Run as many machines as there are rounds, half of them of each test."""
    machines = 0
    for asked in run.parts(MACHINES_A_CHILD):
        tests = _TESTS if asked > 1 else _TESTS[:1]
        machines += _run_machines(run, tests, -(-asked // len(tests)))
        run.done(asked)
    run.notes["machines"] = f"{machines:,}"


def _run_machines(run: Run, tests: Sequence[str], examples: int) -> int:
    """Run so many machines of each test; return their total number."""
    report = run.folder / "report.xml"
    environment = {
        **os.environ,
        "PYTEST_ADDOPTS": "",  # options of CI, such as coverage, are for the outer tests
        "OPENCLAW_STORE_TEST_EXAMPLES": str(examples),
        "OPENCLAW_STORE_TEST_SEED": str(run.random.getrandbits(64)),
    }
    if run.kind == POSTGRESQL:
        environment["OPENCLAW_STORE_TEST_POSTGRES"] = run.server.url
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"),
        *(f"--basetemp={run.folder / 'pytest'}", f"--junitxml={report}"),
        *(f"{test}[{run.kind}]" for test in tests),
    ]
    try:
        ran = subprocess.run(
            command,
            cwd=_PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HangError(f"{error}: {error.output}") from None
    if ran.returncode != 0:
        run.wrong(ran.stdout)
        if not report.exists():
            return 0
    figures = {"machines": 0, "steps": 0}
    tree = ElementTree.parse(report)  # noqa: S314 - pytest has just written it
    for figure in tree.iterfind(".//testcase/properties/property"):
        figures[figure.attrib["name"]] += int(figure.attrib["value"])
    report.unlink()
    asked = examples * len(tests)
    run.check(figures["machines"] >= asked, f"{figures['machines']} of {asked} machines ran")
    run.counts.acknowledged += figures["steps"]
    return figures["machines"]


CAMPAIGN = Campaign(
    name="model",
    title="Hypothesis drives managers at random against a model of their promises",
    promises=("P2", "P3", "P4", "P5", "P6", "P8"),
    perform=perform,
    rounds=2000,
    quick_rounds=0,
    unit="machines",
)
