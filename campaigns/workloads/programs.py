"""Programs that end without closing the store, fork while they use it, or use several event loops.

Each runs in a process of its own, and does not return if it ends the process. It sends:

- `trying` and `acknowledged`, with a task that it adds;
- `tried`, with the attempt, its outcome, the expected outcome, and the seconds it took;
- `child ended`, with the exit status of a forked process;
- `leaving`, with the time, just before it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

from campaigns.workloads.endings import ENDINGS, WORK_IN_PROGRESS
from campaigns.workloads.forks import OTHER_PROGRAMS
from campaigns.workloads.program import Program

PROGRAMS: dict[str, Callable[[Program], None]] = {
    **{
        f"{ending.__name__}, {begin.__name__}": partial(ending, begin=begin)
        for ending, begin in product(ENDINGS, WORK_IN_PROGRESS)
    },
    **{program.__name__: program for program in OTHER_PROGRAMS},
}
"""All programs by name; each runs in a process of its own."""
