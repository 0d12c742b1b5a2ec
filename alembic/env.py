"""Run the migrations for the `alembic` command and for `Database.initialize`."""

import asyncio
from functools import partial
from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError

from openclaw_store.clusters import Clusters
from openclaw_store.database import alembic_environment, legacy_import, migrations
from openclaw_store.encryption import keys_of
from openclaw_store.errors import StoreError

config = context.config
connection = config.attributes.get("connection")
options = context.get_x_argument(as_dictionary=True)
location, cluster = options.get("url"), options.get("cluster")


def upgrade_each() -> None:
    """Run the command for each cluster under its own lock; name those that are left if one fails.

    Started again, it skips those that are done.
    """
    names = asyncio.run(Clusters(migrations.location_of(location)).names())
    for position, name in enumerate(names):
        try:
            upgrade(name)
        except StoreError as error:
            left = ", ".join(names[position:])
            raise CommandError(f"{error}; not done yet: {left}") from error


def upgrade(name: str | None) -> None:
    migrations.migrate(
        migrations.named_by(location, name),
        partial(alembic_environment.run, context),
        to_head=alembic_environment.is_to_head(context),
        legacy_timezone=legacy_import.zone_of(options.get("legacy_timezone")),
        keys=keys_of(None),
    )


if connection is not None:
    alembic_environment.run(context, connection)
elif context.is_offline_mode():
    alembic_environment.run_offline(context, migrations.named_by(location, cluster))
else:
    if config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    try:
        if "all-clusters" in options:
            upgrade_each()
        else:
            upgrade(cluster)
    except StoreError as error:
        raise CommandError(str(error)) from error
