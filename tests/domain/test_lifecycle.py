"""The life of a task as pure functions: every verb from every state, and what it entails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial, reduce
from statistics import fmean
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openclaw_store import (
    Backoff,
    ConflictError,
    InvalidDataError,
    InvalidTransitionError,
    NodeInfo,
    NodeStatus,
    NotOwnerError,
    Task,
    TaskStatus,
    TaskType,
)
from openclaw_store.domain import conditions, lifecycle
from openclaw_store.domain.lifecycle import (
    EXPIRED,
    LOST_TOO_OFTEN,
    NEVER_STARTED,
    NODE_LOST,
    OVERDUE,
    NodeDelta,
    Owner,
    Step,
)
from openclaw_store.domain.models import ASSIGNED, FINISHED, LIVE, WAITING
from openclaw_store.domain.records import Record, encode
from openclaw_store.domain.validation import MAX_INTEGER

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
OWNER: Owner = ("node", 3)


def a_task(**fields: Any) -> Record[Task]:
    """A task of the third attempt, on the node unless told otherwise."""
    defaults: dict[str, Any] = {
        "status": TaskStatus.RUNNING,
        "assigned_node": "node",
        "attempt": 3,
        "submitted_at": before(60),
    }
    return encode(Task("task", TaskType.BATCH, "a task", **{**defaults, **fields}))


def a_node(**fields: Any) -> Record[NodeInfo]:
    """A node that has just shown a sign of life."""
    defaults: dict[str, Any] = {
        "running_tasks": 2,
        "registered_at": before(3600),
        "last_heartbeat": NOW,
    }
    return encode(NodeInfo("node", "host", **{**defaults, **fields}))


def before(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def wait(retry: int) -> float:
    return 10.0 * retry


@dataclass(frozen=True)
class Verb:
    """One thing that may happen to a task, and how it ends from each state."""

    decide: Callable[..., Any]
    """By task and moment; claims and recoveries also take the node."""
    steps_from: frozenset[TaskStatus]
    nothing_to_do_from: frozenset[TaskStatus]
    refused_by: type[ConflictError] | None
    """The error in all other states; `None` if it never is one."""


ALL = frozenset(TaskStatus)
AS_NEW = {
    "status": TaskStatus.PENDING,
    "assigned_node": None,
    "scheduled_at": None,
    "started_at": None,
    "completed_at": None,
}
"""The values of a task that is pending again."""

RECOVER = partial(lifecycle.recover, longest_wait=timedelta(seconds=300), unstarted=None, wait=wait)

VERBS = {
    "claim": Verb(lifecycle.claim, frozenset({TaskStatus.PENDING}), ALL, None),
    "start": Verb(
        partial(lifecycle.start, owner=OWNER),
        frozenset({TaskStatus.SCHEDULED}),
        frozenset({TaskStatus.RUNNING}),
        NotOwnerError,
    ),
    "complete": Verb(
        partial(lifecycle.complete, owner=OWNER, result=b"1"),
        ASSIGNED,
        frozenset({TaskStatus.COMPLETED}),
        NotOwnerError,
    ),
    "fail": Verb(
        partial(lifecycle.fail, owner=OWNER, error="no", wait=wait),
        ASSIGNED,
        frozenset({TaskStatus.FAILED}),
        NotOwnerError,
    ),
    "cancel": Verb(
        partial(lifecycle.cancel, reason="not needed"),
        LIVE,
        frozenset({TaskStatus.CANCELLED}),
        InvalidTransitionError,
    ),
    "requeue": Verb(lifecycle.requeue, ALL - {TaskStatus.PENDING}, ALL, None),
    "release": Verb(partial(lifecycle.release, wait=wait), ASSIGNED, ALL, None),
    "recover": Verb(partial(RECOVER, patience=timedelta()), ASSIGNED, ALL, None),
}
LOST = a_node(status=NodeStatus.OFFLINE)


def decide(verb: str, task: Record[Task], node: Record[NodeInfo] | None = None) -> Any:
    """What a verb makes of a task, on a node that is lost if that is what the verb asks for."""
    if node is None:
        node = LOST if verb == "recover" else a_node()
    return call(verb, task, node)


def call(verb: str, task: Record[Task], node: Record[NodeInfo] | None) -> Any:
    """What a verb makes of a task, with the node for the verbs that depend on it."""
    if verb == "claim":
        return VERBS[verb].decide(task, node, NOW)
    of_node = {"node": node} if verb == "recover" else {}
    return VERBS[verb].decide(task, NOW, **of_node)


class TestEveryVerbFromEveryState:
    @pytest.mark.parametrize("status", TaskStatus)
    @pytest.mark.parametrize("verb", VERBS)
    def test_outcome(self, verb: str, status: TaskStatus) -> None:
        outcome = decide(verb, a_task(status=status))

        rules = VERBS[verb]
        if status in rules.steps_from:
            assert isinstance(outcome, Step)
        elif status in rules.nothing_to_do_from:
            assert outcome is None
        else:
            assert type(outcome) is rules.refused_by

    @pytest.mark.parametrize("status", TaskStatus)
    @pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "requeue"])
    def test_only_requeue_makes_a_finished_task_pending_again(
        self, verb: str, status: TaskStatus
    ) -> None:
        outcome = decide(verb, a_task(status=status))

        if isinstance(outcome, Step):
            assert lifecycle.illegal_transition("task", status, outcome.task["status"]) is None

    @pytest.mark.parametrize("status", TaskStatus)
    @pytest.mark.parametrize("verb", VERBS)
    def test_slot_of_the_node_is_taken_and_released_with_the_task(
        self, verb: str, status: TaskStatus
    ) -> None:
        task = a_task(status=status)

        outcome = decide(verb, task)

        if isinstance(outcome, Step):
            held = conditions.is_assigned(task.replace(**outcome.task)) - conditions.is_assigned(
                task
            )
            assert (outcome.node or NodeDelta()).running == held

    @pytest.mark.parametrize("status", TaskStatus)
    @pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "claim"])
    def test_task_without_a_node_adds_to_no_counters(self, verb: str, status: TaskStatus) -> None:
        task = a_task(status=status, assigned_node=None)
        owner = {"owner": (None, 3)} if verb in ("start", "complete", "fail") else {}
        of_node = {"node": None} if verb == "recover" else {}

        outcome = VERBS[verb].decide(task, NOW, **owner, **of_node)

        assert not isinstance(outcome, Step) or outcome.node is None

    @pytest.mark.parametrize("status", TaskStatus)
    @pytest.mark.parametrize("owner", [("other", 3), ("node", 2), ("node", 4), (None, 3)])
    @pytest.mark.parametrize("verb", ["start", "complete", "fail"])
    def test_only_the_owner_may(self, verb: str, owner: Owner, status: TaskStatus) -> None:
        decide = partial(VERBS[verb].decide, owner=owner)

        refusal = decide(a_task(status=status), NOW)

        assert isinstance(refusal, NotOwnerError)
        assert (refusal.task_id, refusal.node_id, refusal.attempt) == ("task", *owner)
        assert (refusal.status, refusal.current_node) == (status.value, "node")
        assert refusal.current_attempt == 3
        assert status.value in str(refusal)


class TestLegalChanges:
    @pytest.mark.parametrize("after", TaskStatus)
    @pytest.mark.parametrize("before", TaskStatus)
    def test_finished_task_stays_what_it_is(self, before: TaskStatus, after: TaskStatus) -> None:
        refusal = lifecycle.illegal_transition("task", before, after)

        if before in FINISHED and before is not after:
            assert refusal is not None
            assert (refusal.task_id, refusal.before, refusal.after) == ("task", before, after)
            assert f"is {before.value}" in str(refusal)
            assert f"become {after.value}" in str(refusal)
        else:
            assert refusal is None

    @pytest.mark.parametrize("status", TaskStatus)
    def test_moment_of_arrival_is_filled_in_once(self, status: TaskStatus) -> None:
        names = {
            TaskStatus.PENDING: (),
            TaskStatus.SCHEDULED: ("scheduled_at",),
            TaskStatus.RUNNING: ("started_at",),
        }.get(status, ("completed_at",))
        task = a_task(status=status)

        assert lifecycle.missing_time(task, NOW) == dict.fromkeys(names, NOW)
        assert lifecycle.missing_time(task.evolve(**dict.fromkeys(names, before(5))), NOW) == {}


class TestConditions:
    @pytest.mark.parametrize(
        ("not_before", "is_due"),
        [(None, True), (before(1), True), (NOW, True), (before(-0.000001), False)],
    )
    def test_task_is_due_at_its_moment(self, not_before: datetime | None, is_due: bool) -> None:
        assert conditions.is_due(a_task(not_before=not_before), NOW) is is_due

    @given(required=st.lists(st.sampled_from("abc")), available=st.lists(st.sampled_from("abc")))
    def test_node_needs_every_required_skill(
        self, required: list[str], available: list[str]
    ) -> None:
        node, task = a_node(available_skills=available), a_task(required_skills=required)

        assert conditions.has_skills(node, task) is all(one in available for one in required)

    def test_skills_are_compared_as_they_are(self) -> None:
        task = a_task(required_skills=["Java"])

        for other in ("java", "JavaScript", "Java "):
            assert not conditions.has_skills(a_node(available_skills=[other]), task)

    @pytest.mark.parametrize("status", NodeStatus)
    @pytest.mark.parametrize(("most", "running", "free"), [(3, 1, 2), (3, 3, 0), (1, 5, 0)])
    def test_only_a_node_that_is_online_has_slots(
        self, status: NodeStatus, most: int, running: int, free: int
    ) -> None:
        node = a_node(status=status, max_concurrent_tasks=most, running_tasks=running)

        assert conditions.free_slots(node) == (free if status is NodeStatus.ONLINE else 0)

    @pytest.mark.parametrize("status", NodeStatus)
    def test_node_is_lost_when_it_is_silent_or_says_so(self, status: NodeStatus) -> None:
        gone = status in (NodeStatus.OFFLINE, NodeStatus.ERROR)

        patience = timedelta(seconds=9)
        for seconds, is_silent in [(9, False), (10, True), (-9, False), (-10, True)]:
            node = a_node(status=status, last_heartbeat=before(seconds))
            assert conditions.is_lost(node, NOW, patience) is (gone or is_silent)
        assert conditions.is_lost(None, NOW, patience)

    def test_node_that_never_sent_a_heartbeat_counts_from_its_registration(self) -> None:
        node = a_node(last_heartbeat=None, registered_at=before(9))

        assert not conditions.is_lost(node, NOW, timedelta(seconds=9))
        assert conditions.is_lost(node, NOW, timedelta(seconds=8))

    @pytest.mark.parametrize("status", TaskStatus)
    def test_only_a_running_task_is_overdue(self, status: TaskStatus) -> None:
        task = a_task(status=status, timeout=60, started_at=before(60.000001))

        assert conditions.is_overdue(task, NOW) is (status is TaskStatus.RUNNING)

    @pytest.mark.parametrize(
        ("timeout", "started_at"), [(60, before(60)), (None, before(10**6)), (60, None)]
    )
    def test_task_within_its_timeout_is_not_overdue(
        self, timeout: int | None, started_at: datetime | None
    ) -> None:
        assert not conditions.is_overdue(a_task(timeout=timeout, started_at=started_at), NOW)

    def test_timeout_may_be_of_any_length(self) -> None:
        task = a_task(timeout=MAX_INTEGER, started_at=datetime.min.replace(tzinfo=UTC))

        assert not conditions.is_overdue(task, NOW)


class TestSteps:
    def test_claim_makes_the_node_the_owner_of_a_new_attempt(self) -> None:
        task = a_task(
            status=TaskStatus.PENDING,
            assigned_node=None,
            scheduled_at=before(9),
            started_at=before(9),
            completed_at=before(9),
        )

        step = lifecycle.claim(task, a_node(), NOW)

        assert step is not None
        assert step.task == {
            "status": TaskStatus.SCHEDULED,
            "assigned_node": "node",
            "attempt": 4,
            "scheduled_at": NOW,
            "started_at": None,
            "completed_at": None,
        }
        assert step.node == NodeDelta(running=1)

    @pytest.mark.parametrize(
        ("task", "node"),
        [
            ({"not_before": before(-1)}, {}),
            ({"required_skills": ["gpu"]}, {}),
            ({}, {"running_tasks": 5}),
            ({}, {"status": NodeStatus.MAINTENANCE}),
        ],
    )
    def test_nothing_is_claimed_that_the_node_may_not_run(
        self, task: dict[str, Any], node: dict[str, Any]
    ) -> None:
        pending = a_task(status=TaskStatus.PENDING, **task)

        assert lifecycle.claim(pending, a_node(**node), NOW) is None

    def test_start_tells_when(self) -> None:
        step = decide("start", a_task(status=TaskStatus.SCHEDULED))

        assert step == Step({"status": TaskStatus.RUNNING, "started_at": NOW})

    def test_completion_keeps_the_result_and_forgets_the_error(self) -> None:
        step = decide("complete", a_task(error="of the try before", started_at=before(8)))

        assert step.task == {
            "status": TaskStatus.COMPLETED,
            "completed_at": NOW,
            "result": b"1",
            "error": None,
        }
        assert step.node == NodeDelta(running=-1, successful=1, seconds=8.0)

    @pytest.mark.parametrize(
        ("verb", "status", "error"),
        [
            ("fail", TaskStatus.FAILED, "no"),
        ],
    )
    def test_what_fails_is_tried_again_until_its_last_retry(
        self, verb: str, status: TaskStatus, error: str
    ) -> None:
        again = decide(verb, a_task(retry_count=1, max_retries=2, scheduled_at=before(4)))
        over = decide(verb, a_task(retry_count=2, max_retries=2, scheduled_at=before(4)))

        assert again.task == {
            "status": TaskStatus.PENDING,
            "assigned_node": None,
            "scheduled_at": None,
            "started_at": None,
            "completed_at": None,
            "retry_count": 2,
            "not_before": NOW + timedelta(seconds=20),
            "error": error,
        }
        assert over.task == {"status": status, "completed_at": NOW, "error": error}
        for step in (again, over):
            assert step.reason == error
            assert step.node == NodeDelta(running=-1, failed=1, seconds=4.0)

    def test_task_that_runs_too_long_is_tried_again_or_has_timed_out(self) -> None:
        recover = partial(RECOVER, patience=timedelta(seconds=60))
        task = a_task(timeout=5, started_at=before(6), max_retries=1)

        again = recover(task, NOW, node=a_node())
        over = recover(task.evolve(retry_count=1), NOW, node=a_node())

        assert isinstance(again, Step)
        assert isinstance(over, Step)
        assert (again.task["status"], again.task["error"]) == (TaskStatus.PENDING, OVERDUE)
        assert (over.task["status"], over.task["error"]) == (TaskStatus.TIMEOUT, OVERDUE)
        assert over.reason == OVERDUE
        assert over.node == NodeDelta(running=-1, failed=1, seconds=6.0)

    def test_of_a_lost_node_and_a_timeout_the_lost_node_is_the_reason(self) -> None:
        step = decide("recover", a_task(timeout=5, started_at=before(6)))

        assert step.reason == NODE_LOST

    def test_node_that_is_alive_keeps_its_tasks(self) -> None:
        recover = partial(RECOVER, patience=timedelta(seconds=60))

        for status in ASSIGNED:
            assert recover(a_task(status=status, timeout=5), NOW, node=a_node()) is None

    def test_task_without_a_node_is_nobodys_to_lose(self) -> None:
        for status in ASSIGNED:
            assert decide("recover", a_task(status=status, assigned_node=None)) is None

    def test_task_without_a_node_can_run_for_too_long_all_the_same(self) -> None:
        task = a_task(assigned_node=None, timeout=5, started_at=before(6))

        step = RECOVER(task, NOW, node=None, patience=timedelta())

        assert isinstance(step, Step)
        assert step.reason == OVERDUE

    @pytest.mark.parametrize("verb", ["release", "recover"])
    def test_loss_costs_no_retry_and_is_due_at_once_the_first_time(self, verb: str) -> None:
        first = decide(verb, a_task(retry_count=1, scheduled_at=before(4)))
        third = decide(verb, a_task(losses=2, scheduled_at=before(4)))

        assert first.task == {**AS_NEW, "losses": 1, "not_before": None, "error": NODE_LOST}
        later = NOW + timedelta(seconds=20)
        assert third.task == {**AS_NEW, "losses": 3, "not_before": later, "error": NODE_LOST}
        for step in (first, third):
            assert step.reason == NODE_LOST
            assert step.node == NodeDelta(running=-1, failed=1, seconds=4.0)

    @pytest.mark.parametrize("verb", ["release", "recover"])
    def test_task_that_is_lost_too_often_has_failed(self, verb: str) -> None:
        over = decide(verb, a_task(losses=2, max_losses=2))
        never = decide(verb, a_task(losses=1000, max_losses=None))

        failed = {"status": TaskStatus.FAILED, "completed_at": NOW}
        assert over.task == {**failed, "losses": 3, "error": LOST_TOO_OFTEN}
        assert over.reason == LOST_TOO_OFTEN
        assert never.task["status"] is TaskStatus.PENDING

    @pytest.mark.parametrize("verb", ["release", "recover"])
    def test_task_that_was_never_started_is_lost_at_no_cost(self, verb: str) -> None:
        step = decide(verb, a_task(status=TaskStatus.SCHEDULED, scheduled_at=before(4)))

        assert step == Step(AS_NEW, NodeDelta(running=-1), NODE_LOST)

    @pytest.mark.parametrize("status", sorted(ASSIGNED))
    def test_owner_gives_a_task_back_at_no_cost(self, status: TaskStatus) -> None:
        task = a_task(status=status, retry_count=1, losses=1, error="before")

        step = lifecycle.give_back(task, NOW, owner=OWNER, reason=None)
        why = lifecycle.give_back(task, NOW, owner=OWNER, reason="deployment")

        assert step == Step(AS_NEW, NodeDelta(running=-1), "released")
        assert isinstance(why, Step)
        assert why.reason == "released: deployment"

    def test_task_that_has_expired_is_not_claimed(self) -> None:
        waiting = {"status": TaskStatus.PENDING, "assigned_node": None}
        for seconds, is_claimed in ((0, False), (1, False), (-1, True)):
            task = a_task(**waiting, expires_at=before(seconds))
            assert (decide("claim", task) is not None) is is_claimed

    @pytest.mark.parametrize("status", sorted(WAITING))
    def test_task_that_expires_before_its_start_has_timed_out(self, status: TaskStatus) -> None:
        recover = partial(RECOVER, node=a_node(), patience=timedelta(seconds=60))
        node = "node" if status in ASSIGNED else None
        task = a_task(status=status, assigned_node=node, expires_at=NOW)

        step = recover(task, NOW)

        ended = {"status": TaskStatus.TIMEOUT, "completed_at": NOW, "error": EXPIRED}
        delta = NodeDelta(running=-1) if node else None
        assert step == Step(ended, delta, EXPIRED)
        assert recover(task.evolve(status=TaskStatus.RUNNING, assigned_node="node"), NOW) is None
        assert recover(task.evolve(expires_at=before(-1)), NOW) is None

    def test_task_that_a_living_node_does_not_start_returns_if_that_is_wanted(self) -> None:
        recover = partial(RECOVER, node=a_node(), patience=timedelta(seconds=60))
        task = a_task(status=TaskStatus.SCHEDULED, scheduled_at=before(9), updated_at=before(9))

        assert recover(task, NOW) is None
        assert recover(task, NOW, unstarted=timedelta(seconds=9)) is None
        step = recover(task, NOW, unstarted=timedelta(seconds=8))

        assert step == Step(AS_NEW, NodeDelta(running=-1), NEVER_STARTED)

    def test_running_task_is_given_time_to_be_cancelled(self) -> None:
        cancel = partial(lifecycle.cancel, reason="no need", grace=timedelta(seconds=30))
        asked = {
            "cancel_requested_at": NOW,
            "cancel_deadline_at": before(-30),
            "error": "no need",
        }

        step = cancel(a_task(), NOW)

        assert step == Step(asked, None, "no need")
        task = a_task(**asked)
        assert cancel(task, NOW) is None
        recover = partial(RECOVER, node=a_node(), patience=timedelta(seconds=60))
        assert recover(task, before(-29)) is None
        cancelled = Step(
            {"status": TaskStatus.CANCELLED, "completed_at": before(-30)},
            NodeDelta(running=-1),
            "no need",
        )
        assert recover(task, before(-30)) == cancelled
        assert lifecycle.acknowledge_cancel(task, before(-30), owner=OWNER) == cancelled
        assert lifecycle.release(task, before(-30), wait=wait) == cancelled
        assert (
            lifecycle.fail(task, before(-30), owner=OWNER, error="stopped", wait=wait) == cancelled
        )
        assert lifecycle.give_back(task, before(-30), owner=OWNER, reason=None) == cancelled

    @pytest.mark.parametrize("status", sorted(WAITING))
    def test_task_that_does_not_run_is_cancelled_without_grace(self, status: TaskStatus) -> None:
        step = lifecycle.cancel(
            a_task(status=status), NOW, reason=None, grace=timedelta(seconds=30)
        )

        assert isinstance(step, Step)
        assert step.task["status"] is TaskStatus.CANCELLED

    def test_only_a_requested_cancellation_is_acknowledged(self) -> None:
        refused = lifecycle.acknowledge_cancel(a_task(), NOW, owner=OWNER)

        assert isinstance(refused, InvalidTransitionError)
        asked = a_task(cancel_requested_at=NOW)
        other = lifecycle.acknowledge_cancel(asked, NOW, owner=("node", 2))
        assert isinstance(other, NotOwnerError)

    def test_node_in_maintenance_stays_so_when_it_registers(self) -> None:
        node = a_node(status=NodeStatus.MAINTENANCE, status_reason="new disk")

        values = lifecycle.registered(node, NOW)

        assert values["status"] is NodeStatus.MAINTENANCE
        assert values["status_reason"] == "new disk"
        assert "status" not in lifecycle.registered(a_node(status=NodeStatus.ERROR), NOW)

    def test_node_with_a_lease_is_silent_after_it(self) -> None:
        node = a_node(lease_seconds=5, last_heartbeat=before(6))

        assert conditions.is_silent(node, NOW, timedelta(seconds=60))
        assert not conditions.is_silent(node.evolve(lease_seconds=7), NOW, timedelta())

    @pytest.mark.parametrize("reason", [None, "", "not needed"])
    def test_cancellation_tells_why_if_it_is_known(self, reason: str | None) -> None:
        step = lifecycle.cancel(a_task(error="old"), NOW, reason=reason)

        ended = {"status": TaskStatus.CANCELLED, "completed_at": NOW}
        why = {} if reason is None else {"error": reason}
        assert step == Step({**ended, **why}, NodeDelta(running=-1), reason)

    @pytest.mark.parametrize("status", sorted(ALL - {TaskStatus.PENDING}))
    def test_requeued_task_is_as_new_but_for_its_attempts(self, status: TaskStatus) -> None:
        task = a_task(
            status=status,
            retry_count=3,
            not_before=before(1),
            scheduled_at=before(9),
            started_at=before(8),
            completed_at=before(7),
            result=[1],
            error="no",
        )

        step = lifecycle.requeue(task, NOW)

        assert isinstance(step, Step)
        fresh = a_task(status=TaskStatus.PENDING, assigned_node=None, attempt=3)
        assert task.replace(**step.task).copy() == fresh.copy()
        assert step.reason == "requeued"


class TestNodes:
    @given(
        spans=st.lists(
            st.tuples(st.floats(0, 1e6), st.booleans()),
            min_size=1,
            max_size=20,
        )
    )
    def test_totals_are_those_of_what_was_tried(self, spans: list[tuple[float, bool]]) -> None:
        node = a_node(running_tasks=len(spans))
        for seconds, succeeds in spans:
            step = decide("complete" if succeeds else "fail", a_task(started_at=before(seconds)))
            node = node.evolve(**lifecycle.counted(node, step.node))

        assert node.running_tasks == 0
        assert node.total_tasks_processed == len(spans)
        assert node.successful_tasks == sum(succeeds for _, succeeds in spans)
        assert node.failed_tasks == sum(not succeeds for _, succeeds in spans)
        mean = fmean(seconds for seconds, _ in spans)
        assert node.average_execution_time == pytest.approx(mean, abs=1e-5)

    @given(
        deltas=st.lists(
            st.builds(
                NodeDelta,
                st.integers(-1, 1),
                st.integers(0, 3),
                st.integers(0, 3),
                st.floats(0, 1e6),
            ),
            max_size=9,
        )
    )
    def test_deltas_may_be_added_before_they_are_counted(self, deltas: list[NodeDelta]) -> None:
        one = two = a_node(running_tasks=9, total_tasks_processed=3, average_execution_time=2.0)
        for delta in deltas:
            one = one.evolve(**lifecycle.counted(one, delta))
        total = reduce(NodeDelta.plus, deltas, NodeDelta())

        two = two.evolve(**lifecycle.counted(two, total))

        for name in ("running_tasks", "total_tasks_processed", "successful_tasks", "failed_tasks"):
            assert getattr(one, name) == getattr(two, name)
        if all(delta.seconds == 0 or delta.successful + delta.failed for delta in deltas):
            assert one.average_execution_time == pytest.approx(two.average_execution_time)

    def test_counter_that_was_written_by_hand_does_not_become_negative(self) -> None:
        node = a_node(running_tasks=0)

        assert lifecycle.counted(node, NodeDelta(running=-1)) == {"running_tasks": 0}

    def test_clock_that_was_put_back_takes_no_time_off(self) -> None:
        step = decide("complete", a_task(started_at=before(-60)))

        assert step.node == NodeDelta(running=-1, successful=1)

    def test_new_node_is_taken_with_its_totals_but_without_tasks(self) -> None:
        assert lifecycle.registered(None, NOW) == {"running_tasks": 0, "last_heartbeat": NOW}

    def test_node_that_comes_back_goes_on_with_the_totals_that_are_known(self) -> None:
        totals = {
            "total_tasks_processed": 7,
            "successful_tasks": 5,
            "failed_tasks": 2,
            "average_execution_time": 1.5,
        }
        known = a_node(registered_at=before(99), **totals)

        values = lifecycle.registered(known, NOW)

        assert values == {
            "running_tasks": 0,
            "last_heartbeat": NOW,
            "registered_at": before(99),
            **totals,
        }
        by_maintenance = {"status", "status_reason"}
        assert {*values, "version", *by_maintenance} == set(lifecycle.SET_BY_REGISTRATION)


seconds = st.floats(0, 1e9) | st.integers(0, 10**9)
backoffs = st.builds(
    Backoff,
    first_seconds=seconds,
    factor=st.floats(1, 1e9) | st.integers(1, 10**9),
    longest_seconds=seconds,
    jitter=st.floats(0, 1) | st.integers(0, 1),
)


class TestBackoff:
    @given(backoff=backoffs, retry=st.integers(1, MAX_INTEGER), chance=st.floats(0, 1))
    @example(Backoff(factor=2), MAX_INTEGER, 0.5)  # two to the power of that would fill the memory
    @example(Backoff(first_seconds=0), MAX_INTEGER, 0.5)  # is not to wait at all, ever
    def test_wait_is_within_its_bounds(self, backoff: Backoff, retry: int, chance: float) -> None:
        wait = backoff.seconds(retry, chance)

        longest = replace(backoff, jitter=0).seconds(retry, chance)
        assert longest <= backoff.longest_seconds
        assert longest * (1 - backoff.jitter) * (1 - 1e-12) <= wait <= longest
        if backoff.first_seconds == 0:
            assert wait == 0

    @given(backoff=backoffs, retry=st.integers(1, MAX_INTEGER - 1), chance=st.floats(0, 1))
    def test_no_wait_is_shorter_than_the_one_before(
        self, backoff: Backoff, retry: int, chance: float
    ) -> None:
        assert backoff.seconds(retry, chance) <= backoff.seconds(retry + 1, chance)

    def test_wait_grows_by_its_factor_up_to_the_longest(self) -> None:
        backoff = Backoff(first_seconds=2, factor=3, longest_seconds=50, jitter=0)

        assert [backoff.seconds(retry, 0.5) for retry in range(1, 6)] == [2, 6, 18, 50, 50]

    def test_what_failed_together_is_not_tried_again_together(self) -> None:
        backoff = Backoff(first_seconds=100, jitter=0.5)

        waits = {backoff.draw()(1) for _ in range(100)}

        assert len(waits) > 90
        assert all(50 < wait <= 100 for wait in waits)

    def test_chance_is_drawn_once_for_a_task(self) -> None:
        wait = Backoff().draw()

        assert len({wait(1) for _ in range(10)}) == 1

    @pytest.mark.parametrize("name", ["first_seconds", "factor", "longest_seconds", "jitter"])
    @pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e10, "1", None, True])
    def test_nonsense_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidDataError) as caught:
            Backoff(**{name: value})

        assert caught.value.field == name

    @pytest.mark.parametrize(("name", "value"), [("factor", 0.99), ("jitter", 1.01)])
    def test_waits_that_would_shrink_are_refused(self, name: str, value: float) -> None:
        with pytest.raises(InvalidDataError) as caught:
            Backoff(**{name: value})

        assert caught.value.field == name
