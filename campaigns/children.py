"""Processes that a campaign starts, listens to, and kills."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from campaigns.planted import planted

Tell = Callable[..., None]
"""Says values to the parent: at once, and whole or not at all, whenever the process is killed."""

_PROJECT = Path(__file__).parents[1]


class Child:
    """A process that runs a function of a campaign.

    The function, plain or a coroutine function, is called with `tell`, and the arguments. What it
    tells are JSON values. What it prints to the error output is kept in `errors`.

    As a context manager, it is killed at the end if it still runs.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        errors: Path,
        bug: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process.

        Args:
            arguments: JSON values, and paths, which arrive as text.
            errors: The file for its error output, to which it is appended.
            bug: Name of one in `planted`.
            environment: Variables that it has besides.
        """
        self.errors = errors
        call = [function.__module__, function.__name__, bug, [*arguments]]
        with errors.open("ab") as error_output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "campaigns.children", json.dumps(call, default=str)],
                cwd=_PROJECT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=error_output,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def told(self) -> Iterator[Any]:
        """What it tells, waiting for more until it ends. A list for each call of `tell`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):
                yield json.loads(line)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it as `kill -9` does; what it told before can still be read."""
        self._process.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 60) -> int:
        """Wait for its end, and return its exit status; that of a signal is negative."""
        return self._process.wait(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def main(call: str) -> None:
    """Run what the parent wants to be run."""
    module, name, bug, arguments = json.loads(call)
    function = getattr(import_module(module), name)
    output = os.dup(1)
    os.dup2(2, 1)  # what a library may print is no answer

    def tell(*values: Any) -> None:
        os.write(output, json.dumps(values).encode() + b"\n")

    with planted(bug):
        answer = function(tell, *arguments)
        if inspect.iscoroutine(answer):
            asyncio.run(answer)


if __name__ == "__main__":
    main(sys.argv[1])
