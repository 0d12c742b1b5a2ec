"""The tools of developers: counting the entries into modules of the library."""

from __future__ import annotations

import re
import subprocess
import sys

MOST = {"add_task": 45, "claim_tasks": 80, "complete_task": 75, "foreign change": 40}
"""Bounds of the figures, a few above them: a busy thread may end an earlier call meanwhile."""


def test_entries_are_counted_for_each_call() -> None:
    """In a process of its own: the profiler of this one may be in use."""
    command = [sys.executable, "-m", "devtools.entries", "--list"]

    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout

    totals = dict(re.findall(r"^(\w.+?) +(\d+)$", printed, re.MULTILINE))
    listed = re.findall(r"^ +(\d+)  (\S+) → (\S+): ", printed, re.MULTILINE)
    assert list(totals) == list(MOST)
    assert all(int(total) <= MOST[name] for name, total in totals.items())
    assert sum(map(int, totals.values())) == sum(int(number) for number, _, _ in listed)
    assert all(caller != module for _, caller, module in listed)
    assert "-" not in {module for _, _, module in listed}
