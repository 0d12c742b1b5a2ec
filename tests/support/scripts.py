"""Scripts in interpreters of their own, which end as a program ends."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How an interpreter ended."""

    code: int
    out: list[str]
    err: str


SERVER = """
import asyncio, json, os, random, signal, sys, tempfile, time
import openclaw_store

async def warm_up():  # Alembic reads more modules when it is first used
    async with openclaw_store.Database(":memory:"):
        pass

def end(child, files):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, *(os.pread(file, 1 << 24, 0).decode() for file, _ in files)])
    for file, name in files:
        os.close(file)
        os.unlink(name)

def serve():
    # Returns in each child, with its script.
    for request in requests:
        at_once, folder, environment, scripts = json.loads(request)
        running = []
        for script, arguments in scripts:
            files = [tempfile.mkstemp() for _ in range(2)]
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.alarm(300)
                for number, file in enumerate((nothing, *(file for file, _ in files))):
                    os.dup2(file, number)
                requests.close()
                os.close(answers)
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                time.tzset()
                random.seed()
                tempfile.tempdir = None  # it was that of the environment before
                sys.argv[1:] = arguments
                return script
            running.append((child, files))
            if len(running) == at_once:
                end(*running.pop(0))
        for one in running:
            end(*one)
        os.write(answers, b"%d\\n%s" % (len(answer := json.dumps(results).encode()), answer))
        results.clear()

if os.environ.get("OPENCLAW_STORE_TEST_CLUSTER"):
    sys.path.insert(0, sys.argv[1])
    from support.in_cluster import open_in_cluster
    open_in_cluster()
    del sys.path[0]
asyncio.run(warm_up())
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the tests is the end of the requests
requests, answers, nothing = os.fdopen(os.dup(0)), os.dup(1), os.open(os.devnull, os.O_RDONLY)
results = []
script = serve()
if script is not None:
    exec(script, {"__name__": "__main__"})
"""


TESTS = str(Path(__file__).parents[1])

RUN_FILE = """
import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs the file that is its first argument, as `python FILE` does."""


class ForkServer:
    """An interpreter that has imported the library, which takes longer than most scripts do.

    It runs each script in a fork of itself.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SERVER, TESTS],
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(self._process.communicate)  # it ends when nothing more can be asked

    def run(
        self,
        scripts: Sequence[tuple[str, Sequence[object]]],
        at_once: int,
        folder: Path,
        environment: Mapping[str, str],
    ) -> list[Ended]:
        """Run scripts, and wait for their ends."""
        several = [(script, [*map(str, arguments)]) for script, arguments in scripts]
        request = json.dumps([at_once, str(folder), dict(environment), several])
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(request.encode() + b"\n")
        stdin.flush()
        answer = stdout.read(int(stdout.readline()))
        return [Ended(code, out.splitlines(), err) for code, out, err in json.loads(answer)]


fork_server = cache(ForkServer)


def run_scripts(
    *scripts: tuple[str, Sequence[object]],
    at_once: int = 1,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Run scripts, with their arguments, each in an interpreter of its own.

    One that hangs is ended after five minutes; its code shows that.

    Args:
        at_once: The number of scripts that run at the same time.
        folder: The folder to start in; by default the present one.
        environment: Variables that are added to those of this process.
    """
    return fork_server().run(
        scripts, at_once, folder or Path.cwd(), {**os.environ, **(environment or {})}
    )
