"""Scripts in interpreters of their own, which end as a program ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Ended(NamedTuple):
    """How an interpreter ended."""

    code: int
    out: list[str]
    err: str


RUNNER = """
import asyncio, json, os, signal, sys, tempfile
import openclaw_store

async def warm_up():  # Alembic reads more modules when it is first used
    async with openclaw_store.Database(":memory:"):
        pass

def end(child, files):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, *(os.pread(file, 1 << 20, 0).decode() for file, _ in files)])
    for _, name in files:
        os.unlink(name)

asyncio.run(warm_up())
results, running = [], []
for script, arguments in json.load(sys.stdin):
    files = [tempfile.mkstemp() for _ in range(2)]
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        for number, (file, _) in enumerate(files, 1):
            os.dup2(file, number)
        sys.argv[:] = [sys.argv[0], *arguments]
        exec(script, {"__name__": "__main__"})
        break
    running.append((child, files))
    if len(running) == int(sys.argv[1]):
        end(*running.pop(0))
else:
    for one in running:
        end(*one)
    json.dump(results, sys.stdout)
"""


def run_scripts(*scripts: tuple[str, Sequence[object]], at_once: int = 1) -> list[Ended]:
    """Run scripts, with their arguments, each in an interpreter of its own.

    They are forks of one that has imported the library, which takes longer than all the rest.
    One that hangs is ended after five minutes, which is told by its code.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER, str(at_once)],
        input=json.dumps([[script, [*map(str, arguments)]] for script, arguments in scripts]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [Ended(code, out.splitlines(), err) for code, out, err in json.loads(done.stdout)]
