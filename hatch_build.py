"""The hook of the build: only files that git tracks enter the wheel and the source distribution."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SPECIAL = re.compile(r"([*?\[\\ ])")


class TrackedFiles(BuildHookInterface[BuilderConfig]):
    """Leaves out the untracked files of a checkout, such as keys, notes and unfinished modules."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not Path(self.root, ".git").exists():
            return  # an unpacked source distribution has tracked files only
        command = ["git", "ls-files", "--others", "--directory", "-z"]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True)
        names = filter(None, done.stdout.split("\0"))
        # The patterns are those of `.gitignore`.
        patterns = ["/" + _SPECIAL.sub(r"\\\1", name) for name in names]
        self.build_config.target_config.setdefault("exclude", []).extend(patterns)
