"""The command that serves the page: which options it refuses, and how it begins and ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import PATIENCE, MakeTask
from typer.testing import CliRunner

from devtools.postgres import free_port
from openclaw_store import Database, StateManager
from openclaw_store.cli.commands import app
from openclaw_store.cli.web import list_clusters
from openclaw_store.clusters import Clusters
from openclaw_store.web.render import CHINESE

pytestmark = pytest.mark.sqlite

SECRET = "a secret of many characters"


@pytest.fixture
async def path(database: Database, tmp_path: Path) -> Path:
    return Path(database.db_path)


def token_file(folder: Path, text: str = SECRET, mode: int = 0o600) -> str:
    file = folder / "token"
    file.write_text(f"{text}\n")
    file.chmod(mode)
    return str(file)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["--host", "0.0.0.0"], "host: other machines may read the page only with"),
            (["--host", "example.org"], "host: other machines"),
            (["--allow-actions"], "allow-actions: actions are allowed only with --token-file"),
            (["--token-file", "missing"], "token-file: missing cannot be read"),
        ],
    )
    def test_unsafe_options(self, path: Path, options: list[str], reason: str) -> None:
        done = CliRunner().invoke(app, ["-d", str(path), "web", *options])

        assert (done.exit_code, done.stdout) == (1, "")
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1

    @pytest.mark.parametrize(
        ("text", "mode", "reason"),
        [
            (SECRET, 0o644, "others can read"),
            ("short", 0o600, "token: must have at least 16 characters"),
            ("", 0o600, "token: must have at least 16 characters"),
        ],
    )
    def test_unsafe_tokens(
        self, path: Path, tmp_path: Path, text: str, mode: int, reason: str
    ) -> None:
        options = ["--token-file", token_file(tmp_path, text, mode)]

        done = CliRunner().invoke(app, ["-d", str(path), "web", *options])

        assert done.exit_code == 1
        assert reason in done.stderr

    def test_missing_packages_are_named(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("openclaw_store.cli.web.find_spec", lambda name: None)

        done = CliRunner().invoke(app, ["-d", str(path), "web"])

        assert done.exit_code == 1
        assert 'pip install "openclaw-store[web]"' in done.stderr


async def test_page_is_served_until_sigterm_while_browsers_watch(
    path: Path, tmp_path: Path, make_task: MakeTask
) -> None:
    port = free_port()
    command = [sys.executable, "-W", "error", "-m", "openclaw_store", "-d", str(path), "web"]
    options = ["--port", str(port), "--token-file", token_file(tmp_path), "--allow-actions"]
    process = await asyncio.create_subprocess_exec(*command, *options, stderr=subprocess.PIPE)
    try:
        headers = {"authorization": f"Bearer {SECRET}"}
        async with (
            asyncio.timeout(PATIENCE),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client,
        ):
            while True:
                try:
                    answer = await client.get("/")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.02)
            async with client.stream("GET", "/events") as stream:
                lines = stream.aiter_lines()
                assert await anext(lines) == ": still here"
                async with StateManager(Database(path), None) as other:
                    await other.add_task(make_task(task_id="t"))
                found = ""
                while "data:" not in found:
                    found = await anext(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line async for line in lines if line.startswith("data:")]
            _, messages = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert answer.status_code == 200
    assert '"item_id":"t"' in found
    assert rest == []
    assert messages.decode().splitlines() == [
        f"http://127.0.0.1:{port}/ shows {path}: Ctrl-C stops it"
    ]
    assert process.returncode in (0, -signal.SIGTERM)


async def test_clusters_of_the_location_are_listed(tmp_path: Path, make_task: MakeTask) -> None:
    location = f"{tmp_path}/{{cluster}}.db"
    for name in ("alpha", "beta"):
        await Clusters(location).create(name)
    async with StateManager(Database(location, cluster="beta"), None) as state:
        await state.add_task(make_task())

    found = await list_clusters(location)

    assert [(one["Cluster"], one["Tasks"], one["Problem"]) for one in found] == [
        ("alpha", "0", ""),
        ("beta", "1", ""),
    ]
    assert found[0].keys() <= CHINESE.keys()
