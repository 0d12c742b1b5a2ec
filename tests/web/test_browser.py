"""The page in a real browser: keys, live updates, both languages, accessibility, no script.

Skipped without Playwright or a Chromium; the reason says what to install.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devtools.browser import missing, running_browser
from devtools.screenshots import SHOTS, TOKEN, served
from openclaw_store import (
    Database,
    Progress,
    StateManager,
    Task,
    TaskFilter,
    TaskStatus,
    TaskType,
    utc_now,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

REASON = missing()

pytestmark = [
    pytest.mark.sqlite,
    pytest.mark.skipif(REASON is not None, reason=f"no browser: {REASON}"),
]

HOSTILE = "<img src=x onerror=alert(1)>\"'<script>alert(2)</script>"
PATHS = (
    "/",
    "/tasks",
    "/nodes",
    "/node?id=cygnus",
    "/task?id=train-fold",
    "/changes",
    "/health",
    "/clusters",
)


@pytest.fixture(autouse=True)
def nothing_leaks() -> None:
    """Replace the search for leaks: threads of the server come and go, and it runs on a loop."""


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser") / "cluster.db"


@pytest.fixture(scope="module")
def address(location: Path) -> Iterator[str]:
    with served(location) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def context(browser: Browser, address: str) -> Iterator[BrowserContext]:
    """A browser that has presented the token."""
    context = browser.new_context(base_url=address)
    page = context.new_page()
    page.goto("/")
    assert findings(page) == []
    page.fill("input[type=password]", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("nav")
    page.close()
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that fails the test if a script breaks, or anything is blocked."""
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    yield page
    page.close()
    assert problems == []


def change(location: Path, work: Callable[[StateManager], Awaitable[Any]]) -> None:
    """Change the store as another process would."""

    async def run() -> None:
        async with StateManager(Database(location), None, cache=False) as state:
            await work(state)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    thread.join()


def findings(page: Page, *rules: str) -> list[str]:
    """What axe finds, by all rules or some."""
    from axe_playwright_python.sync_playwright import (  # type: ignore[import-untyped]  # it has none
        Axe,
    )

    options = {"runOnly": [*rules]} if rules else None
    found = Axe().run(page, options=options).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found]


@pytest.mark.parametrize(("language", "theme"), [("en", "light"), ("zh", "dark")])
def test_each_page_is_accessible(page: Page, language: str, theme: str) -> None:
    page.goto(f"/preferences?theme={theme}&lang={language}")

    for path in PATHS:
        page.goto(path)

        is_new = theme == "light" or path in ("/", "/task?id=train-fold", "/health")
        assert findings(page, *([] if is_new else ["color-contrast"])) == [], path
        assert page.get_attribute("html", "data-theme") == theme
        assert (page.get_attribute("html", "lang") == "zh-CN") == (language == "zh")
        assert not re.search("[一-鿿]", page.inner_text("main h1")) or language == "zh"
    page.goto("/preferences?theme=light&lang=en")


def test_narrow_page_needs_no_scrolling_sideways(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 800})

    for path in PATHS:
        page.goto(path)

        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


def test_changes_appear_by_themselves(page: Page, location: Path) -> None:
    page.goto("/changes")
    page.wait_for_selector("#live:not([hidden])")
    task = Task.create(TaskType.BATCH, HOSTILE, task_id=HOSTILE)

    change(location, lambda state: state.add_task(task))

    row = page.wait_for_selector("#changes tr.new")
    assert row is not None
    assert HOSTILE in row.inner_text()
    row.query_selector("a").click()  # type: ignore[union-attr]  # the row has a link
    page.wait_for_selector("h1[data-watch]")
    assert page.inner_text("h1") == HOSTILE
    change(location, lambda state: state.cancel_task(HOSTILE, HOSTILE))
    page.wait_for_selector("main .badge.cancelled")
    page.goto("/")
    before = page.inner_text("[data-count='tasks.pending']")
    page.wait_for_selector("#live:not([hidden])")
    other = Task.create(TaskType.BATCH, "one more")
    change(location, lambda state: state.add_task(other))
    page.wait_for_function(
        "text => document.querySelector(\"[data-count='tasks.pending']\").textContent !== text",
        arg=before,
    )
    change(location, lambda state: state.remove_task(other.task_id))


def test_progress_appears_by_itself(page: Page, location: Path) -> None:
    found: list[Task] = []

    async def find(state: StateManager) -> None:
        found.extend(await state.list_tasks(TaskFilter(status=TaskStatus.RUNNING), limit=1))

    change(location, find)
    [task] = found
    page.clock.install()
    page.goto(f"/task?id={task.task_id}")
    assert page.is_visible("main .badge.running")
    assert not page.is_visible("main progress")

    progress = {task.task_id: Progress(task.attempt, 0.25, HOSTILE, utc_now())}
    change(location, lambda state: state.renew_lease(str(task.assigned_node), progress))
    page.clock.run_for(4000)

    page.wait_for_selector("main progress[value='0.25']")
    assert HOSTILE in page.inner_text("main")
    assert findings(page) == []


def test_task_is_cancelled_and_requeued_with_the_keyboard_alone(page: Page, location: Path) -> None:
    task = Task.create(TaskType.BATCH, "by keys", task_id="keys")
    change(location, lambda state: state.add_task(task))
    page.goto("/nodes")

    page.keyboard.press("/")
    page.keyboard.type("keys")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1[data-watch=keys]")
    for label, badge in (("Cancel the task", "cancelled"), ("Requeue the task", "pending")):
        for _ in range(40):
            if page.evaluate("document.activeElement.textContent") == label:
                break
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"main .badge.{badge}")
        assert page.is_visible("main .done")


def test_times_are_shown_in_utc_or_local_time(browser: Browser, address: str) -> None:
    context = browser.new_context(base_url=address, timezone_id="Asia/Shanghai")
    page = context.new_page()
    page.goto("/tasks?status=completed")
    page.fill("input[type=password]", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("td time")
    shown = page.inner_text("td time")
    page.click("#zone")
    local = page.inner_text("td time")
    page.reload()

    assert shown.endswith(" UTC")
    assert int(local[11:13]) == (int(shown[11:13]) + 8) % 24
    assert page.inner_text("td time") == local
    context.close()


def test_page_works_without_a_script(browser: Browser, address: str, location: Path) -> None:
    task = Task.create(TaskType.BATCH, "no script", task_id="plain")
    change(location, lambda state: state.add_task(task))
    context = browser.new_context(base_url=address, java_script_enabled=False)
    page = context.new_page()
    page.goto("/task?id=plain")
    page.fill("input[type=password]", TOKEN)
    page.click("main button")

    assert page.inner_text("h1") == "plain"
    assert page.is_hidden("#zone")
    page.fill("main input[name=reason]", "no longer wanted")
    page.click("text=Cancel the task")
    page.wait_for_selector("main .badge.cancelled")
    for path in PATHS:
        page.goto(path)
        assert page.inner_text("h1")
    page.goto("/nodes")
    page.click("main a.id >> nth=0")
    page.click("text=Drain the node" if page.is_visible("text=Drain the node") else "text=Resume")
    page.wait_for_selector("main .done")
    page.goto("/tasks?status=running&node=draco")
    page.click("main a.id >> nth=0")
    page.click("text=Release the task")
    page.wait_for_selector("main .done")
    assert page.inner_text("main p .badge") == "pending"
    page.goto("/node?id=draco")
    page.click("text=Release all its tasks")
    page.wait_for_selector("main .done")
    assert page.is_hidden("text=Release all its tasks")
    context.close()


def test_script_in_a_page_does_not_run(context: BrowserContext) -> None:
    page = context.new_page()
    page.goto("/changes")

    blocked = page.evaluate(
        """() => new Promise((done) => {
            document.addEventListener(
                "securitypolicyviolation", (event) => done(event.violatedDirective)
            );
            const script = document.createElement("script");
            script.textContent = "window.hacked = true";
            document.body.append(script);
            setTimeout(() => done("nothing was blocked"), 2000);
        })"""
    )

    assert blocked == "script-src-elem"
    assert page.evaluate("window.hacked") is None
    page.close()


def test_pictures_of_the_docs_are_of_pages_that_exist() -> None:
    assert {path.partition("?")[0] for _, path, *_ in SHOTS} <= {
        path.partition("?")[0] for path in PATHS
    }
