"""A browser for tests and screenshots: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")


def missing() -> str | None:
    """Return the reason for which there is no browser; `None` if there is one."""
    if not find_spec("playwright"):
        return "playwright is not installed: pip install playwright"
    if not any(map(shutil.which, _PROGRAMS)):
        return "there is no Chromium: apt-get install chromium-headless-shell"
    return None


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run a browser without a window."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, _PROGRAMS)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield browser
        finally:
            browser.close()
