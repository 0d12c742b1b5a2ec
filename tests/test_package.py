"""What is installed: the wheel, outside of a checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import openclaw_store

ROOT = Path(__file__).parent.parent


def run(*command: object, folder: Path, **environment: str) -> str:
    """Run Python with arguments, in a folder; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


UNTRACKED = (
    "openclaw_store/secret.env",
    "openclaw_store/new folder/[key].pem",
    "openclaw_store/database/unfinished.py",
    "alembic/versions/0099_mine.py",
    "docs/notes.md",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, with untracked files in it."""
    folder = tmp_path_factory.mktemp("checkout")

    def git(*arguments: str, root: Path = folder) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

    for name in filter(None, git("ls-files", "-z", root=ROOT).split("\0")):
        if (ROOT / name).exists():  # it may be deleted, and not yet committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git("init", "-q")
    git("add", "-A")
    for name in UNTRACKED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('mine')\n")
    return folder


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel and the source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("built")
    run("-m", "hatchling", "build", "-d", folder, folder=checkout)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which nothing but the wheel is installed."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    run("-m", "pip", "install", "-q", *options, "--target", target, wheel, folder=target)
    return target


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


class TestWheel:
    def test_wheel_carries_the_library_its_types_and_its_migrations_and_no_more(
        self, wheel: Path
    ) -> None:
        page = (ROOT / "openclaw_store" / "web").rglob("*.*")
        library = [
            *(ROOT / "openclaw_store").rglob("*.py"),
            *(file for file in page if file.suffix in (".html", ".css", ".js", ".svg", ".json")),
        ]
        modules = {file.relative_to(ROOT).as_posix() for file in library}
        scripts = {
            f"openclaw_store/_alembic/{file.relative_to(ROOT / 'alembic').as_posix()}"
            for pattern in ("*.py", "*.mako", "versions/*.py")
            for file in (ROOT / "alembic").glob(pattern)
        }

        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}

        assert any("/versions/0001_" in name for name in scripts)
        assert names == {*modules, *scripts, "openclaw_store/py.typed", "pytest_openclaw_store.py"}

    def test_wheel_carries_the_license(self, wheel: Path, metadata: Message) -> None:
        with zipfile.ZipFile(wheel) as archive:
            licenses = [name for name in archive.namelist() if name.endswith("/LICENSE")]

        assert len(licenses) == 1
        assert metadata["License-Expression"] == "MIT"

    def test_metadata_names_the_version_and_bounded_dependencies(self, metadata: Message) -> None:
        required = [
            requirement
            for requirement in metadata.get_all("Requires-Dist", [])
            if "extra ==" not in requirement
        ]

        assert metadata["Version"] == openclaw_store.__version__
        assert metadata["Requires-Python"] == ">=3.11"
        names = {re.split(r"[^\w-]", requirement)[0] for requirement in required}
        assert names == {"aiosqlite", "alembic", "orjson", "sqlalchemy"}
        assert all("<" in requirement and ">=" in requirement for requirement in required)
        assert {"dev", "postgres"} <= set(metadata.get_all("Provides-Extra", []))

    def test_untracked_files_enter_neither_the_wheel_nor_the_source_distribution(
        self, built: Path, wheel: Path
    ) -> None:
        """Succeeded before: keys and notes in the folder of the package were published."""
        (sdist,) = built.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        with zipfile.ZipFile(wheel) as archive_of_wheel:
            in_wheel = set(archive_of_wheel.namelist())

        assert names & set(UNTRACKED) == set()
        assert in_wheel & {*UNTRACKED, "openclaw_store/_alembic/versions/0099_mine.py"} == set()
        assert {"openclaw_store/errors.py", "hatch_build.py", "docs/index.md"} <= names


class TestInstalled:
    def test_database_is_made_outside_of_a_checkout(self, installed: Path, tmp_path: Path) -> None:
        script = """
import asyncio
import openclaw_store
from openclaw_store import *
from openclaw_store.database import migrations

async def main():
    async with Database("data/cluster.db") as database:
        await TaskRepository(database).create(Task.create(TaskType.BATCH, "t"))
        print(openclaw_store.__file__, migrations.SCRIPTS, sep="\\n")
        print(await TaskRepository(database).count_by_status())

asyncio.run(main())
"""

        file, scripts, count = run(
            *("-W", "error", "-c", script), folder=tmp_path, PYTHONPATH=str(installed)
        ).splitlines()

        assert Path(file) == installed / "openclaw_store" / "__init__.py"
        assert Path(scripts) == installed / "openclaw_store" / "_alembic"
        assert count == "1"
        assert [path.name for path in tmp_path.iterdir()] == ["data"]
