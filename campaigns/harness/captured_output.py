"""Unwanted output of this process: errors that are not handled, warnings and log records."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from campaigns.harness.campaign import Run


class CapturedOutput:
    """Unwanted output: unhandled errors, warnings, and log records above INFO."""

    def __init__(self) -> None:
        self.recorded: list[str] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record all output in this process."""
        recorded = self.recorded

        class Recorder(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                recorded.append(f"logged: {record.getMessage()}")

        recorder, root = Recorder(logging.WARNING), logging.getLogger()
        root.addHandler(recorder)
        try:
            with (
                patch.object(
                    sys, "unraisablehook", lambda one: recorded.append(f"{one.exc_value!r}")
                ),
                patch.object(
                    threading, "excepthook", lambda one: recorded.append(f"{one.exc_value!r}")
                ),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("always")
                warnings.showwarning = lambda message, *_, **__: recorded.append(
                    f"warned: {message}"
                )
                yield
        finally:
            root.removeHandler(recorder)

    def record_loop_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Record an error passed to an event loop."""
        self.recorded.append(
            f"the loop reported: {context['message']} {context.get('exception')!r}"
        )

    def report_to(self, run: Run, where: str) -> None:
        """Report the recorded output as a violation by the last call."""
        for recorded in self.recorded:
            run.wrong(f"{where}: {recorded}")
        self.recorded.clear()
