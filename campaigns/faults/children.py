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
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from campaigns.faults.planted_bugs import planted
from campaigns.harness.campaign import HangError

Send = Callable[..., None]
"""Sends values to the parent at once; a kill never leaves half a message."""

PATIENCE_SECONDS = 300.0
"""Seconds of silence, or of waiting for the end, after which a process counts as hanging."""

_PROJECT = Path(__file__).parents[2]


class Child:
    """A process that runs a function of a campaign.

    The function, plain or a coroutine function, receives `send` and the arguments. It sends JSON
    values. Its error output goes to the file `errors`.

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
            environment: Additional environment variables.
            patience_seconds: Time limit for the next message, and for the end.
        """
        self._errors = errors
        self._name, self._patience_seconds = function.__name__, patience_seconds
        call = [function.__module__, function.__name__, bug, [*arguments]]
        with errors.open("ab") as error_output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "campaigns.faults.children", json.dumps(call, default=str)],
                cwd=_PROJECT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=error_output,
                bufsize=0,  # `select` does not see data in a buffer
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
        output, rest = self._process.stdout, b""
        assert output is not None
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while True:
                if not selector.select(self._patience_seconds):
                    raise self._hang("sent nothing")
                received = output.read(1 << 16)
                if not received:
                    break
                # A message that a kill has cut has no newline: it stays in `rest`, and is dropped.
                *lines, rest = (rest + received).split(b"\n")
                yield from map(json.loads, lines)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the process and its forks as `kill -9` does; sent messages stay readable."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

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
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _hang(self, what: str) -> HangError:
        self.kill()
        seconds = f"{self._patience_seconds:g} s"
        return HangError(f"a process of {self._name} has {what} for {seconds}: {self.complaint}")


def main(call: str) -> None:
    """Run the call that the parent has described."""
    module, name, bug, arguments = json.loads(call)
    function = getattr(import_module(module), name)
    output = os.dup(1)
    os.dup2(2, 1)  # output of a library must not mix with messages

    def send(*values: Any) -> None:
        # One unbuffered write: a kill afterwards cannot take the message back.
        os.write(output, json.dumps(values).encode() + b"\n")

    with planted(bug):
        answer = function(send, *arguments)
        if inspect.iscoroutine(answer):
            asyncio.run(answer)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    main(sys.argv[1])
