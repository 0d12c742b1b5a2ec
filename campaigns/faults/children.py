"""Child processes of a campaign, which can be killed at any moment."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, Self

from campaigns.faults.planted_bugs import planted
from campaigns.harness.campaign import HangError

Send = Callable[..., None]
"""Sends values to the parent at once; a kill never leaves half a message."""

PATIENCE_SECONDS = 300.0
"""Seconds of silence, or of waiting for the end, after which a process counts as hanging."""

_PROJECT = Path(__file__).parents[2]

_PRELOADED = ["__main__", "alembic.command", "asyncpg", "campaigns.scenarios.catalogue"]
"""What children import, which takes longer than most of them live."""


class Process(Protocol):
    """A started process."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit status; `None` while it runs."""

    def wait(self, timeout: float) -> int:
        """Wait for the end; raise `subprocess.TimeoutExpired` after `timeout` seconds."""


class Fork:
    """A process that a server forks, which has imported what children need."""

    def __init__(self, call: str, errors: Path) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.output, output = context.Pipe(duplex=False)
        with output:
            self._process = context.Process(
                target=_run_fork, args=(call, errors, {**os.environ}, output)
            )
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode


class Child:
    """A process that runs a function of a campaign.

    The function, plain or a coroutine function, receives `send` and the arguments. It sends JSON
    values. Its error output goes to the file `errors`. It is a fork of a process that has imported
    the library, or has an interpreter of its own if `environment` is given.

    The context manager kills a process that still runs at the end, also after a timeout.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        errors: Path,
        bug: str | None = None,
        environment: Mapping[str, str] | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Start the process.

        Args:
            arguments: JSON values, and paths, which arrive as text.
            errors: The file for its error output, which is appended.
            bug: Name of a planted bug.
            environment: Additional environment variables, even none, of an own interpreter.
            patience_seconds: Time limit for the next message, and for the end.
        """
        self._errors = errors
        self._name, self._patience_seconds = function.__name__, patience_seconds
        call = json.dumps([function.__module__, function.__name__, bug, [*arguments]], default=str)
        self._process: Process
        if environment is None:
            self._process = fork = Fork(call, errors)
            self._output = fork.output
            return
        self._output, output = get_context("forkserver").Pipe(duplex=False)
        with output, errors.open("ab") as error_output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "campaigns.faults.children", call],
                cwd=_PROJECT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output.fileno(),
                stderr=error_output,
                process_group=0,  # so that `kill` reaches its forks
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def complaint(self) -> str:
        """The last lines of `errors`."""
        return self._errors.read_text(errors="replace")[-2000:]

    def messages(self) -> Iterator[Any]:
        """Yield the messages until the process ends: a list of values for each call of `send`.

        Raises:
            HangError: If it is silent for too long.
        """
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while True:
                if not selector.select(self._patience_seconds):
                    raise self._hang("sent nothing")
                received = os.read(self._output.fileno(), 1 << 16)
                if not received:
                    break
                # A message that a kill has cut has no newline: it stays in `rest`, and is dropped.
                *lines, rest = (rest + received).split(b"\n")
                yield from map(json.loads, lines)

    def signal(self, number: int) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and its forks as `kill -9` does; sent messages stay readable."""
        if self._process.poll() is None:
            for kill in (os.kill, os.killpg):  # it has no group yet, if it has just started
                with suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the end, and return the exit status; that of a signal is negative.

        Raises:
            HangError: If it does not end.
        """
        try:
            return self._process.wait(self._patience_seconds)
        except subprocess.TimeoutExpired:
            raise self._hang("not ended") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self._output.close()

    def _hang(self, what: str) -> HangError:
        self.kill()
        seconds = f"{self._patience_seconds:g} s"
        return HangError(f"a process of {self._name} has {what} for {seconds}: {self.complaint}")


def _run_fork(call: str, errors: Path, environment: Mapping[str, str], output: Connection) -> None:
    """Run a call as in an interpreter that the parent has started just now."""
    os.setpgid(0, 0)
    os.chdir(_PROJECT)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    with errors.open("ab") as error_output:
        for number in (1, 2):
            os.dup2(error_output.fileno(), number)
    main(call, output.fileno())


def main(call: str, output: int) -> None:
    """Run the call that the parent has described; messages go to the file `output`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    module, name, bug, arguments = json.loads(call)
    function = getattr(import_module(module), name)

    def send(*values: Any) -> None:
        # One unbuffered write: a kill afterwards cannot take the message back.
        os.write(output, json.dumps(values).encode() + b"\n")

    with planted(bug):
        answer = function(send, *arguments)
        if inspect.iscoroutine(answer):
            asyncio.run(answer)


if __name__ == "__main__":
    messages = os.dup(1)
    os.dup2(2, 1)  # output of a library must not mix with messages
    main(sys.argv[1], messages)
