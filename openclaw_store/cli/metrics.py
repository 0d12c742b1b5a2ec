"""The command that prints the metrics: `openclaw-store metrics`."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command
from openclaw_store.errors import UnavailableError


@command(app)
async def metrics(call: Call) -> None:
    """Print all metrics for Prometheus, as for its textfile collector.

    Those of a process are zero here: each process exports its own.
    """
    if not find_spec("prometheus_client"):
        raise UnavailableError('this needs a package: pip install "openclaw-store[otel]"')
    from openclaw_store.observability.prometheus import PrometheusExporter

    async with call.opened() as database:
        text = (await PrometheusExporter(database).text()).decode()
    if call.as_json:
        call.show({"text": text})
    else:
        typer.echo(text, nl=False)
