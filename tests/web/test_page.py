"""The page over HTTP: what it shows, what it refuses, and what its forms do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, FakeClock, MakeNode, MakeTask, until
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient, Response

import openclaw_store.web
from openclaw_store import InvalidDataError, Progress, StateManager, TaskStatus
from openclaw_store.maintenance.stuck import Reason
from openclaw_store.web import app
from openclaw_store.web.live import RELOAD, STILL_HERE, Live
from openclaw_store.web.render import CHINESE, DONE, duration, number
from openclaw_store.web.security import COOKIE, HEADERS

TOKEN = "correct horse battery staple"
BEARER = {"authorization": f"Bearer {TOKEN}"}
HTML = {"accept": "text/html"}
HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}"
PATHS = ("/", "/tasks", "/nodes", "/changes", "/health", "/health?figures=1", "/clusters")
FOLDER = Path(openclaw_store.web.__file__).parent


@asynccontextmanager
async def browsing(state: StateManager, **options: Any) -> AsyncIterator[AsyncClient]:
    page = app(state, **options)
    transport = ASGITransport(page)
    async with AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await page.state.stop()
    await until(lambda: not state.db.checked_out_connections)  # a read may still end


async def log_in(client: AsyncClient, token: str = TOKEN) -> Response:
    return await client.post("/login", data={"token": token})


async def secret_of(client: AsyncClient, path: str) -> str:
    [secret, *_] = re.findall(r'name="secret" value="(\w+)"', (await client.get(path)).text)
    return str(secret)


async def no_clusters() -> list[dict[str, str]]:
    return [{"name": HOSTILE, "state": "well"}]


class TestPages:
    @pytest.mark.parametrize("language", ["en", "zh"])
    async def test_each_page_shows_hostile_values_as_text(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode, language: str
    ) -> None:
        node = make_node(
            node_id=HOSTILE, hostname=HOSTILE, available_skills=[HOSTILE], tags=[HOSTILE]
        )
        await manager.register_node(node)
        hostile = {"name": HOSTILE, "user_id": HOSTILE, "description": HOSTILE}
        task = make_task(
            task_id=HOSTILE, required_skills=[HOSTILE], parameters={HOSTILE: HOSTILE}, **hostile
        )
        await manager.add_task(task)
        await manager.add_task(make_task(task_id=f"2{HOSTILE}", required_skills=["?" + HOSTILE]))
        [claimed] = await manager.claim_tasks(HOSTILE, start=True)
        await manager.drain_node(HOSTILE, HOSTILE)
        await manager.fail_task(claimed, HOSTILE)
        await manager.add_task(
            make_task(status=TaskStatus.FAILED, error=HOSTILE, completed_at=manager.db.clock())
        )
        async with browsing(
            manager, token=TOKEN, allow_actions=True, clusters=no_clusters
        ) as client:
            client.headers.update({**BEARER, "accept-language": language})
            for path in PATHS:
                answer = await client.get(path)
                assert answer.status_code == 200, path
                assert "<script>alert" not in answer.text
                assert "alert(1)</" not in answer.text
            for path in ("/task", "/node"):
                answer = await client.get(path, params={"id": HOSTILE})
                assert answer.status_code == 200
                assert "<script>alert" not in answer.text
                assert "&lt;script&gt;alert(1)" in answer.text
            answer = await client.get("/tasks", params={"name": HOSTILE, "id": HOSTILE + "?"})
            assert "<script>alert" not in answer.text
            assert ("任务" in answer.text) == (language == "zh")

    async def test_every_answer_has_the_headers_that_protect_it(
        self, manager: StateManager
    ) -> None:
        async with browsing(manager) as client:
            for path in (*PATHS, "/static/page.js", "/healthz", "/nothing"):
                answer = await client.get(path)
                assert {name: answer.headers[name] for name in HEADERS} == HEADERS
                assert "unsafe" not in answer.headers["content-security-policy"]
                assert " style=" not in answer.text
                assert not re.search(r"<script(?! src=)| on\w+=\"", answer.text) or ".js" in path

    async def test_list_of_tasks_has_pages_and_filters(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        tasks = [make_task(task_id=f"t{number:03}", name=f"page {number}") for number in range(120)]
        await manager.add_tasks([*tasks, make_task(task_id="odd", user_id="anna")])
        found: list[str] = []
        async with browsing(manager) as client:
            following = "?status=pending"
            while following:
                text = (await client.get(f"/tasks{following}")).text
                found += re.findall(r'class="id" href="/task\?id=([^"]+)"', text)
                links = re.findall(r'rel="next" href="([^"]+)"', text)
                following = links[0].replace("&amp;", "&") if links else ""
            filtered = (await client.get("/tasks?user=anna")).text
            refused = await client.get("/tasks?after=nonsense")

        assert len(found) == len(set(found)) == 121
        assert re.findall(r'href="/task\?id=([^"]+)"', filtered) == ["odd"]
        assert refused.status_code == 400
        assert "must be the `after`" in refused.text

    async def test_search_leads_to_the_task_or_node(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        await manager.add_task(make_task(task_id="a/b ?"))
        await manager.add_node(make_node(node_id="atlas"))
        async with browsing(manager) as client:
            task = await client.get("/tasks", params={"id": " a/b ? "})
            node = await client.get("/tasks", params={"id": "atlas"})
            neither = await client.get("/tasks", params={"id": "who"})
            shown = await client.get(task.headers["location"])
            missing = [await client.get(path) for path in ("/task?id=who", "/node?id=who")]

        assert task.headers["location"] == "/task?id=a%2Fb+%3F"
        assert node.headers["location"] == "/node?id=atlas"
        assert "No task or node has this identifier" in neither.text
        assert "Why it waits" in shown.text
        assert [answer.status_code for answer in missing] == [404, 404]

    async def test_overview_has_the_numbers_failures_and_stuck_tasks(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask
    ) -> None:
        gone = {"status": TaskStatus.RUNNING, "assigned_node": "gone", "started_at": clock()}
        await manager.add_task(make_task(task_id="held", **gone))
        await manager.add_task(
            make_task(status=TaskStatus.FAILED, error="page 7 is torn", completed_at=clock())
        )
        async with browsing(manager) as client:
            text = (await client.get("/")).text

        assert 'data-count="tasks.failed">1<' in text
        assert "page # is torn" in text
        assert re.search(r"node lost: <a[^>]+>gone</a>", text)
        assert "1 finished, 1 failed" in text

    async def test_removed_task_still_has_its_history(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t"))
        await manager.remove_task("t")
        async with browsing(manager) as client:
            text = (await client.get("/task?id=t")).text

        assert "This task was removed." in text

    async def test_progress_of_running_tasks_is_shown_in_lists_and_alone(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode, clock: FakeClock
    ) -> None:
        await manager.register_node(make_node(node_id="atlas"))
        await manager.add_tasks([make_task(task_id="t"), make_task(task_id="silent")])
        await manager.claim_tasks("atlas", 2, start=True)
        await manager.renew_lease("atlas", {"t": Progress(1, 0.4, HOSTILE, clock())})
        async with browsing(manager) as client:
            paths = ("/tasks", "/node?id=atlas", "/task?id=t", "/task?id=silent")
            shown = [(await client.get(path)).text for path in paths]

        assert [text.count('<progress value="0.4"') for text in shown] == [1, 1, 1, 0]
        assert [text.count("40%, &lt;script&gt;alert(1)") for text in shown] == [1, 1, 1, 0]

    async def test_page_works_under_a_prefix_of_another_program(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t"))
        page = app(manager, token=TOKEN, allow_actions=True)
        program = FastAPI()
        program.mount("/store", page)
        transport = ASGITransport(program)
        async with AsyncClient(transport=transport, base_url="http://localhost") as client:
            away = await client.get("/store/tasks?status=pending", headers=HTML)
            back = await client.post(away.headers["location"], data={"token": TOKEN})
            text = (await client.get(back.headers["location"])).text
            style = await client.get("/store/static/page.css")
            secret = await secret_of(client, "/store/task?id=t")
            form = {"secret": secret, "action": "cancel", "id": "t"}
            done = await client.post("/store/action", data=form)
        await page.state.stop()

        assert away.headers["location"] == "/store/login?next=%2Ftasks%3Fstatus%3Dpending"
        assert back.headers["location"] == "/store/tasks?status=pending"
        assert "Path=/store" in back.headers["set-cookie"]
        links = re.findall(r'(?:href|src|action)="(/[^"]*)"', text)
        assert links
        assert all(link.startswith("/store/") for link in links)
        assert style.status_code == 200
        assert done.headers["location"] == "/store/task?id=t&done=cancel"

    async def test_health_verifies_on_request(self, manager: StateManager) -> None:
        async with browsing(manager) as client:
            started = await client.post("/verify")
            text = ""
            while "Values checked" not in text:
                text = (await client.get("/health")).text
                assert started.status_code == 303

        assert "No problem was found." in text

    async def test_supervisor_learns_that_the_database_is_away(self, manager: StateManager) -> None:
        async with browsing(manager) as client:
            well = await client.get("/healthz")
            await manager.shutdown()
            away = await client.get("/healthz")
            page = await client.get("/tasks")

        assert (well.status_code, away.status_code, page.status_code) == (200, 503, 503)
        assert "database" in page.text


@pytest.mark.sqlite
class TestAccess:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [({"token": "short"}, "at least 16"), ({"allow_actions": True}, "must be given")],
    )
    async def test_unsafe_pages_are_refused(
        self, manager: StateManager, options: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(InvalidDataError, match=reason):
            app(manager, **options)

    async def test_nothing_is_shown_without_the_token(self, manager: StateManager) -> None:
        async with browsing(manager, token=TOKEN, clusters=no_clusters) as client:
            for path in (*PATHS, "/events", "/task?id=x", "/metrics"):
                assert (await client.get(path)).status_code == 401, path
                wrong = {"authorization": f"Bearer {TOKEN}x"}
                assert (await client.get(path, headers=wrong)).status_code == 401
            assert (await client.get("/tasks", headers=HTML)).status_code == 303
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/tasks", headers=BEARER)).status_code == 200

    async def test_session_of_a_browser_ends(self, manager: StateManager, clock: FakeClock) -> None:
        async with browsing(manager, token=TOKEN) as client:
            wrong = await log_in(client, "wrong")
            answer = await log_in(client)
            inside = await client.get("/tasks")
            cookie = answer.cookies[COOKIE]
            clock.advance(seconds=13 * 3600)
            late = await client.get("/tasks")
            answers = []
            for forged in (cookie[:-1] + "0", cookie.replace(".", "9.", 1), "", "a.b.c", "9e9.x."):
                client.cookies.set(COOKIE, forged)
                answers.append((await client.get("/tasks")).status_code)

        assert (wrong.status_code, "not the token" in wrong.text) == (401, True)
        attributes = answer.headers["set-cookie"]
        assert "HttpOnly" in attributes
        assert "SameSite=strict" in attributes
        assert (inside.status_code, late.status_code) == (200, 401)
        assert answers == [401] * 5

    async def test_logout_removes_the_session(self, manager: StateManager) -> None:
        async with browsing(manager, token=TOKEN) as client:
            await log_in(client)
            await client.post("/logout")
            after = await client.get("/tasks")

        assert after.status_code == 401

    async def test_page_of_one_machine_has_its_names_only(self, manager: StateManager) -> None:
        async with browsing(manager, hosts=["localhost", "[::1]"]) as client:
            names = ("localhost", "localhost:18790", "[::1]:18790", "evil.example", "")
            answers = [await client.get("/nodes", headers={"host": name}) for name in names]

        assert [answer.status_code for answer in answers] == [200, 200, 200, 421, 421]

    @pytest.mark.parametrize(
        "target", ["//evil.example", "https://evil.example", "/\\evil.example", "/\n/x", "x"]
    )
    async def test_no_link_leads_away(self, manager: StateManager, target: str) -> None:
        async with browsing(manager, token=TOKEN) as client:
            chosen = await client.get(
                "/preferences", params={"theme": "dark", "next": target}, headers=BEARER
            )
            entered = await client.post("/login", params={"next": target}, data={"token": TOKEN})

        assert chosen.headers["location"] == entered.headers["location"] == "/"
        assert "openclaw_store_theme=dark" in chosen.headers["set-cookie"]


class TestActions:
    async def test_each_action_changes_the_store(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        await manager.register_node(make_node(node_id="atlas", max_concurrent_tasks=9))
        await manager.add_tasks([make_task(task_id=f"t{number}") for number in range(4)])
        await manager.claim_tasks("atlas", 3, start=True)
        steps = [
            ("release", "t0", "task", "t0", TaskStatus.PENDING),
            ("cancel", "t0", "task", "t0", TaskStatus.CANCELLED),
            ("requeue", "t0", "task", "t0", TaskStatus.PENDING),
            ("drain", "atlas", "node", "atlas", "maintenance"),
            ("release_all", "atlas", "task", "t2", TaskStatus.PENDING),
            ("resume", "atlas", "node", "atlas", "online"),
        ]
        async with browsing(manager, token=TOKEN, allow_actions=True) as client:
            await log_in(client)
            secret = await secret_of(client, "/task?id=t0")
            assert 'name="attempt" value="1"' in (await client.get("/task?id=t0")).text
            old = {"secret": secret, "action": "release", "id": "t0", "attempt": "0"}
            moved = await client.post("/action", data=old)
            assert (moved.status_code, "has moved" in moved.text) == (409, True)
            for action, id, item, changed, status in steps:
                form = {"secret": secret, "action": action, "id": id, "reason": "maintenance 7"}
                answer = await client.post("/action", data=form)
                assert answer.status_code == 303, answer.text
                page = await client.get(answer.headers["location"])
                assert DONE[action] in page.text
                entity: Any = (
                    await manager.get_task(changed)
                    if item == "task"
                    else await manager.get_node(changed)
                )
                assert entity.status == status
        history = await manager.history("t0")
        assert [one.reason for one in history if one.to_status == "cancelled"] == ["maintenance 7"]

    async def test_forms_of_others_are_refused(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t"))
        form = {"action": "cancel", "id": "t"}
        async with browsing(manager, token=TOKEN, allow_actions=True) as client:
            nobody = await client.post("/action", data=form)
            await log_in(client)
            secret = await secret_of(client, "/task?id=t")
            refused = [
                await client.post("/action", data=form),
                await client.post("/action", data={**form, "secret": "x" * 64}),
                await client.post("/action", data={**form, "secret": secret, "pad": "x" * 70_000}),
                await client.post(
                    "/action",
                    data={**form, "secret": secret},
                    headers={"sec-fetch-site": "cross-site"},
                ),
                await client.post("/action", data=form, headers={"authorization": "Basic eA=="}),
            ]
        task = await manager.get_task("t")

        assert nobody.status_code == 401
        assert [answer.status_code for answer in refused] == [403] * 5
        assert task is not None
        assert task.status is TaskStatus.PENDING

    async def test_actions_that_cannot_be_done_are_explained(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t", status=TaskStatus.COMPLETED))
        await manager.add_task(make_task(task_id="p"))
        async with browsing(manager, token=TOKEN, allow_actions=True) as client:
            client.headers.update(BEARER)
            answers = [
                await client.post("/action", data={"action": action, "id": id})
                for action, id in [
                    ("cancel", "t"),
                    ("release", "p"),
                    *((action, "who") for action in ("cancel", "requeue", "release")),
                    *((action, "who") for action in ("drain", "resume")),
                    ("explode", "t"),
                ]
            ]

        assert [answer.status_code for answer in answers] == [409, 303, *[404] * 5, 400]
        assert "completed" in answers[0].text

    async def test_page_that_only_reads_has_no_actions(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t"))
        async with browsing(manager, token=TOKEN) as client:
            client.headers.update(BEARER)
            answer = await client.post("/action", data={"action": "cancel", "id": "t"})
            text = (await client.get("/task?id=t")).text

        assert answer.status_code == 404
        assert "Cancel the task" not in text


class TestLive:
    async def test_numbers_follow_each_change(
        self, manager: StateManager, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        await manager.add_task(make_task(task_id="old", status=TaskStatus.FAILED))
        live = Live(manager)
        await live.start()
        events = live.events(live.revision)
        assert await anext(events) == STILL_HERE

        await manager.register_node(make_node(node_id="atlas"))
        await manager.add_tasks([make_task(task_id="t1"), make_task(task_id="t2")])
        [task] = await manager.claim_tasks("atlas", start=True)
        await manager.complete_task(task)
        await manager.remove_task("old")
        shown: list[dict[str, Any]] = []
        while not shown or shown[-1]["revision"] < manager.version:
            text = (await anext(events)).decode()
            if text.startswith("id:"):
                shown.append(json.loads(text.split("data: ")[1]))
        await live.stop()

        revisions = [one["revision"] for event in shown for one in event["changes"]]
        assert revisions == sorted(set(revisions))
        assert {key: n for key, n in live.tasks.items() if n} == {"pending": 1, "completed": 1}
        assert {key: n for key, n in live.nodes.items() if n} == {"online": 1}
        minute = live.intervals(clock())[-1]
        assert (minute.submitted, minute.finished, minute.failed) == (3, 1, 0)
        assert [event async for event in events] == []

    async def test_browser_that_connects_again_misses_nothing(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        live = Live(manager)
        await live.start()
        start = live.revision
        await manager.add_task(make_task(task_id="t1"))
        await until(lambda: live.revision == manager.version)

        again = live.events(start)
        first = await anext(again)
        second = await anext(again)
        await again.aclose()
        too_old = live.events(start - 1) if start else live.events(start)
        stale = await anext(too_old)
        await too_old.aclose()
        await live.stop()

        assert first == STILL_HERE
        assert b'"item_id":"t1"' in second
        assert stale == (RELOAD if start else STILL_HERE)

    async def test_compaction_makes_browsers_load_the_page_again(
        self, manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        live = Live(manager)
        await live.start()
        events = live.events(live.revision)
        await anext(events)
        await live.stop()
        await manager.add_tasks([make_task() for _ in range(5)])
        await manager.compact_changes(0)
        live = Live(manager)
        await live.start()
        again = live.events(0)

        first = await anext(again)
        await again.aclose()
        await live.stop()

        assert first == RELOAD
        assert live.tasks["pending"] == 5

    async def test_browser_that_connects_during_the_stop_is_sent_away(
        self, manager: StateManager
    ) -> None:
        live = Live(manager)
        await live.start()

        await live.stop()
        async with asyncio.timeout(PATIENCE):  # else they never end
            late = [event async for event in live.events(live.revision)]

        assert late == [STILL_HERE]

    async def test_follower_ends_with_its_store(
        self, manager: StateManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        live = Live(manager)
        await live.start()
        events = live.events(live.revision)
        await anext(events)

        await manager.shutdown()

        assert [event async for event in events] == []


@pytest.mark.sqlite
class TestTexts:
    def test_every_text_has_a_translation(self) -> None:
        used: set[str] = {*DONE.values(), *Reason, "Pages"}
        for path in FOLDER.rglob("*.html"):
            text = path.read_text(encoding="utf-8")
            used.update(re.findall(r"_\([\"']([^\"']+)[\"']\)", text))
            for pairs in re.findall(r"\{% for [\w, ]*text in (\[.+?\])", text):
                used.update(re.findall(r"\"([A-Z][^\"]*)\"\)", pairs))
        used.update(
            re.findall(r"refused\(request, \"([^\"]+)\"", (FOLDER / "actions.py").read_text())
        )

        assert sorted(used - CHINESE.keys()) == []

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (None, "–"),
            (0.35, "350 ms"),
            (-3, "0 ms"),
            (2.5, "2.5 s"),
            (42, "42 s"),
            (125 * 60, "2 h 5 min"),
            (timedelta(days=3, hours=2), "3 d 2 h"),
        ],
    )
    def test_durations(self, seconds: Any, text: str) -> None:
        assert duration(seconds) == text

    def test_numbers(self) -> None:
        assert [number(one) for one in (None, 0, 0.5, 12, 1234567)] == [
            "–",
            "0",
            "0.5",
            "12",
            "1,234,567",
        ]
