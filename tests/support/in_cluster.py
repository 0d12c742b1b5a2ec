"""Tests in a cluster: all that they open on PostgreSQL is in the schema of `CLUSTER`."""

from __future__ import annotations

import os
from typing import Any

import pytest

from openclaw_store.backends import PostgreSQL

CLUSTER = os.environ.get("OPENCLAW_STORE_TEST_CLUSTER")
"""A cluster in whose schema the tests on PostgreSQL run; without it, they run in `public`.

    OPENCLAW_STORE_TEST_CLUSTER=berlin pytest -m postgresql -n 0 tests/repositories

It is for tests/repositories, tests/state_manager and tests/database. Scripts of `run_scripts` run
in the cluster, too; tests that start other interpreters are skipped.
"""

starts_interpreter = pytest.mark.skipif(
    CLUSTER is not None, reason="it starts an interpreter, which does not know the cluster"
)
"""Marks a test whose program is not run by `run_scripts`."""


def open_in_cluster() -> None:
    """Have this process open what names no cluster in `CLUSTER`, if that is set."""
    if CLUSTER is None:
        return
    initialize: Any = PostgreSQL.__init__

    def in_cluster(
        self: Any, location: str, timeout: float, answer: float, cluster: str | None = None
    ) -> None:
        initialize(self, location, timeout, answer, cluster or CLUSTER)

    PostgreSQL.__init__ = in_cluster  # type: ignore[assignment,method-assign]  # it takes no more than the tests give
