"""The entry point of `openclaw-store` and `python -m openclaw_store`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line, or name the missing packages."""
    if not all(map(find_spec, ("typer", "rich"))):
        sys.exit('the command line needs typer and rich: pip install "openclaw-store[cli]"')
    from openclaw_store.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
