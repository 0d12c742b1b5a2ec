"""Run the migrations for the `alembic` command and for `Database.initialize`."""

from functools import partial
from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError

from openclaw_store.database import legacy_import, migrations
from openclaw_store.errors import StoreError

config = context.config
connection = config.attributes.get("connection")
options = context.get_x_argument(as_dictionary=True)
location = options.get("url")

if connection is not None:
    migrations.run(context, connection)
elif context.is_offline_mode():
    migrations.run_offline(context, migrations.named_by(location))
else:
    if config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    try:
        migrations.migrate(
            migrations.named_by(location),
            partial(migrations.run, context),
            to_head=migrations.is_to_head(context),
            legacy_timezone=legacy_import.zone_of(options.get("legacy_timezone")),
        )
    except StoreError as error:
        raise CommandError(str(error)) from error
