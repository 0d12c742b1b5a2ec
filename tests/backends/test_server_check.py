"""Tables and functions on a server that are not the store's, or run code of other roles."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest
from conftest import MakeTask, execute
from sqlalchemy import make_url

from openclaw_store import Database, SchemaMismatchError, TaskRepository
from openclaw_store.backends.factory import backend_of
from openclaw_store.backends.postgresql.pg_dump import TABLES
from openclaw_store.database import migrations
from openclaw_store.database.server_check import digest
from openclaw_store.database.store_write import BODIES, FUNCTION, signature
from openclaw_store.maintenance.doctor import Level, diagnose
from openclaw_store.maintenance.verify import verify

pytestmark = pytest.mark.postgresql


@pytest.fixture
def roles(location: str) -> Iterator[tuple[str, str]]:
    """Two roles that may log in and make objects in the schema, as all before version 15."""
    names = f"role_{uuid4().hex}", f"role_{uuid4().hex}"
    for name in names:
        execute(location, f"CREATE ROLE {name} LOGIN")
        execute(location, f"GRANT CREATE ON SCHEMA public TO {name}")
    execute(location, "CREATE SCHEMA loot")
    execute(location, "CREATE TABLE loot.evidence (text text)")
    script(location, "GRANT ALL ON SCHEMA loot TO PUBLIC; GRANT INSERT ON loot.evidence TO PUBLIC")
    body = "BEGIN INSERT INTO loot.evidence VALUES (current_user); RETURN {}; END"
    functions = {
        "act() RETURNS trigger": "new", "yes(a text) RETURNS boolean": "true",
        "word() RETURNS text": "''",
    }  # fmt: skip
    for head, result in functions.items():
        volatile = "IMMUTABLE" if "yes" in head else ""
        execute(
            as_role(location, names[0]),
            f"CREATE FUNCTION loot.{head} LANGUAGE plpgsql {volatile} AS $${body.format(result)}$$",
        )
    yield names
    for name in names:
        execute(location, f"DROP OWNED BY {name} CASCADE")
        execute(location, f"DROP ROLE {name}")


def as_role(location: str, role: str) -> str:
    """Return the URL with which a role connects."""
    return make_url(location).set(username=role).render_as_string(hide_password=False)


def script(location: str, statements: str) -> None:
    """Run statements, none of which contains a semicolon."""
    for statement in statements.split(";"):
        execute(location, statement)


async def is_refused(location: str, said: str, *, role: str | None = None) -> None:
    """Each way to a database refuses it, and nothing of the other role has run."""
    owner, location = location, as_role(location, role) if role else location
    for migrate in (True, False):
        with pytest.raises(SchemaMismatchError, match=said):
            await Database(location).initialize(migrate)
    for call in (migrations.check, migrations.upgrade):
        with pytest.raises(SchemaMismatchError, match=said):
            await asyncio.to_thread(call, backend_of(location))
    with pytest.raises(SchemaMismatchError, match=said):
        await asyncio.to_thread(migrations.downgrade, backend_of(location), "base")
    [found] = [one for one in await diagnose(Database(location)) if one.level is Level.ERROR]
    assert found.name == "schema"
    assert execute(owner, "SELECT * FROM loot.evidence") == []


async def test_tables_that_another_role_made_first_are_refused(
    location: str, another_location: str, roles: tuple[str, str]
) -> None:
    mine = as_role(location, roles[0])
    script(
        mine,
        "CREATE TABLE alembic_version (version_num varchar(32) DEFAULT loot.word());"
        "ALTER TABLE alembic_version ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY p ON alembic_version USING (loot.yes(version_num));"
        "CREATE TRIGGER t BEFORE INSERT ON alembic_version FOR EACH ROW"
        " EXECUTE FUNCTION loot.act()",
    )
    execute(mine, "INSERT INTO alembic_version VALUES ('')")
    execute(location, "DELETE FROM loot.evidence")

    await is_refused(location, f"alembic_version belongs to the role '{roles[0]}'.*ALTER SCHEMA")


async def test_whole_store_of_another_role_is_refused(
    location: str, roles: tuple[str, str]
) -> None:
    async with Database(as_role(location, roles[0])):
        pass
    execute(location, f"GRANT ALL ON {', '.join(TABLES)} TO {roles[1]}")
    for table, column in (("nodes", "node_id"), ("alembic_version", "version_num")):
        script(
            as_role(location, roles[0]),
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;"
            f"CREATE POLICY p ON {table} USING (loot.yes({column}))",
        )

    await is_refused(location, "alembic_version belongs to the role")
    await is_refused(location, "alembic_version belongs to the role", role=roles[1])


PLANTED = {
    "has row security": "ALTER TABLE {}tasks ENABLE ROW LEVEL SECURITY",
    "has the policy 'p'": "CREATE POLICY p ON {}nodes USING (loot.yes(node_id))",
    "has the trigger 't'": (
        "CREATE TRIGGER t AFTER INSERT ON {}changes EXECUTE FUNCTION loot.act()"
    ),
    "has the rule 'r'": "CREATE RULE r AS ON INSERT TO {}counters DO ALSO SELECT loot.word()",
    "has the child 'loot.child'": "CREATE TABLE loot.child () INHERITS ({}tasks)",
    "has the parent 'loot.parent'": (
        "CREATE TABLE loot.parent (name text NOT NULL); ALTER TABLE {}tasks INHERIT loot.parent"
    ),
    "has the constraint 'c'": "ALTER TABLE {}tasks ADD CONSTRAINT c CHECK (loot.yes(name))",
    "has the constraint 'ck_tasks_status'": (
        "ALTER TABLE {}tasks DROP CONSTRAINT ck_tasks_status;"
        "ALTER TABLE {}tasks ADD CONSTRAINT ck_tasks_status"
        " CHECK (query_to_xml('SELECT loot.word()', true, true, '') IS NOT NULL)"
    ),
    "computes its column 'error'": "ALTER TABLE {}tasks ALTER error SET DEFAULT loot.word()",
    "computes its column 'version_num'": (
        "ALTER TABLE {}alembic_version ALTER version_num SET DEFAULT lower('A')"
    ),
    "uses 'function loot.yes": "CREATE INDEX i ON {}tasks (name) WHERE loot.yes(name)",
    "uses 'type loot.name": (
        "CREATE DOMAIN loot.name AS text CHECK (loot.yes(VALUE));"
        "ALTER TABLE {}tasks ALTER name TYPE loot.name"
    ),
    "tasks is no ordinary table": (
        "ALTER TABLE {}tasks RENAME TO former; CREATE VIEW {}tasks AS SELECT * FROM {}former"
    ),
}
"""What an owner, or a role to which it has granted all, can put on a table; and what is said."""


@pytest.mark.parametrize("said", PLANTED)
async def test_table_with_code_on_it_is_refused(
    database: Database, location: str, roles: tuple[str, str], said: str
) -> None:
    schema = "public."
    script(location, PLANTED[said].format(schema, schema, schema))
    execute(location, "DELETE FROM loot.evidence")

    await is_refused(location, said)


async def test_reference_from_a_table_of_another_role_is_refused(
    database: Database, location: str, roles: tuple[str, str]
) -> None:
    """Deferred triggers on its table would run as the role that deletes a task."""
    execute(location, f"GRANT REFERENCES ON tasks TO {roles[0]}")
    execute(
        as_role(location, roles[0]),
        "CREATE TABLE loot.mine (id varchar(64) REFERENCES public.tasks ON DELETE CASCADE)",
    )

    await is_refused(location, "'loot.mine' of another role refers to public.tasks")


async def test_function_that_another_role_made_first_is_refused(
    location: str, another_location: str, roles: tuple[str, str]
) -> None:
    execute(
        as_role(location, roles[0]),
        f"CREATE FUNCTION {signature('public')} RETURNS text LANGUAGE sql AS 'SELECT loot.word()'",
    )

    await is_refused(location, f"the function public.{FUNCTION} belongs to the role '{roles[0]}'")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ALTER FUNCTION {} SECURITY DEFINER", "has other settings"),
        ("ALTER FUNCTION {} SET search_path = public", "has other settings"),
        ("ALTER FUNCTION {} OWNER TO {role}", "belongs to the role"),
        ("UPDATE pg_proc SET prosrc = replace(prosrc, 'now_', 'now()') WHERE proname = '{name}'",
         "was changed"),
    ],
)  # fmt: skip
async def test_changed_function_is_refused_and_made_again(
    database: Database,
    location: str,
    roles: tuple[str, str],
    make_task: MakeTask,
    change: str,
    said: str,
) -> None:
    ours = signature("public")
    execute(location, change.format(ours, role=roles[0], name=FUNCTION))

    await is_refused(location, f"the function public.{FUNCTION} {said}.*db upgrade")
    execute(location, f"DROP FUNCTION {ours}")
    with pytest.raises(SchemaMismatchError, match=f"lacks the function {FUNCTION}.*db upgrade"):
        await Database(location).initialize(migrate=False)
    async with Database(location) as again:
        await TaskRepository(again).create(make_task())
    await asyncio.to_thread(migrations.check, backend_of(location))


async def test_index_with_operators_of_an_extension_is_the_owners_matter(
    database: Database, location: str
) -> None:
    script(
        location,
        "CREATE SCHEMA words; CREATE EXTENSION citext SCHEMA words;"
        "CREATE INDEX i ON tasks (CAST(name AS words.citext))",
    )

    async with Database(location) as again:
        assert not (await verify(again)).problems


async def test_other_functions_of_the_name_are_found_and_harm_nothing(
    location: str, roles: tuple[str, str], make_task: MakeTask
) -> None:
    """They are never called; but another role could keep the store from opening by a refusal."""
    mine = as_role(location, roles[0])
    for former in ("store_write_1", "store_write_2", FUNCTION):
        for arguments in ("", "a integer", "VARIADIC a text[]", "a timestamptz, b text[]"):
            body = "LANGUAGE sql AS 'SELECT loot.word()'"
            execute(mine, f"CREATE FUNCTION public.{former}({arguments}) RETURNS text {body}")

    async with Database(location) as database:
        await TaskRepository(database).create(make_task())
        problems = (await verify(database)).problems
        found = [one for one in await diagnose(database) if one.name == "schema"]
    with pytest.raises(SchemaMismatchError, match=rf"another function public.{FUNCTION}\(\): drop"):
        await asyncio.to_thread(migrations.check, backend_of(location))
    for revision in ("0007", "0003", "0002", migrations.HEAD, "base"):
        if revision == migrations.HEAD:
            await asyncio.to_thread(migrations.upgrade, backend_of(location))
        else:
            await asyncio.to_thread(migrations.downgrade, backend_of(location), revision)

    assert [one.invariant for one in problems] == ["file"] * 4
    assert {one.level for one in found} == {Level.WARNING}
    assert execute(location, "SELECT * FROM loot.evidence") == []


async def test_digests_are_those_of_the_newest_function(location: str) -> None:
    """A migration that defines the function again sets `FUNCTION` and `BODIES`."""
    found = set()
    for cluster in (None, "tasks"):
        await asyncio.to_thread(migrations.upgrade, backend_of(location, cluster=cluster))
        schema = cluster or "public"
        [(body,)] = execute(
            location,
            f"SELECT prosrc FROM pg_proc WHERE proname = '{FUNCTION}'"
            f" AND pronamespace = '{schema}'::regnamespace",
        )
        found.add(digest(body, schema))
        await asyncio.to_thread(migrations.check, backend_of(location, cluster=cluster))

    assert found == BODIES


class TestTrustedOwners:
    """Deployments in which a role that owns the tables migrates, and another one uses them."""

    async def use(self, url: str, make_task: MakeTask) -> None:
        database = Database(url)
        await database.initialize(migrate=False)
        await TaskRepository(database).create(make_task())
        assert not (await verify(database)).problems
        await database.close()

    def grant(self, location: str, role: str) -> None:
        execute(location, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(TABLES)} TO {role}")

    @pytest.mark.parametrize(
        "trust",
        [
            "ALTER SCHEMA public OWNER TO {owner}",
            "ALTER DATABASE {database} OWNER TO {owner}",
            "CREATE ROLE {group}; ALTER DATABASE {database} OWNER TO {group};"
            "GRANT {group} TO {owner}",
            "GRANT {owner} TO {role}",
            "CREATE ROLE {group}; GRANT {owner} TO {group}; GRANT {group} TO {role}",
            "ALTER ROLE {owner} SUPERUSER",
        ],
    )
    async def test_role_with_grants_uses_the_tables_of_a_trusted_owner(
        self, location: str, roles: tuple[str, str], make_task: MakeTask, trust: str
    ) -> None:
        owner, role = roles
        database, group = make_url(location).database, f"group_{uuid4().hex}"
        former = execute(location, "SELECT current_user")[0][0]
        script(location, trust.format(owner=owner, role=role, database=database, group=group))
        try:
            async with Database(as_role(location, owner)):
                pass
            self.grant(location, role)
            await self.use(as_role(location, role), make_task)
        finally:
            execute(location, f"ALTER DATABASE {database} OWNER TO {former}")
            execute(location, "ALTER SCHEMA public OWNER TO pg_database_owner")
            if "group" in trust:
                execute(location, f"DROP OWNED BY {group}")
                execute(location, f"DROP ROLE {group}")

    async def test_owner_is_not_trusted_by_the_grants_of_a_third_role(
        self, location: str, roles: tuple[str, str]
    ) -> None:
        """Each role could grant itself before version 16, and its makers can since then."""
        owner, role = roles
        maker = f"maker_{uuid4().hex}"
        execute(location, f"CREATE ROLE {maker} LOGIN CREATEROLE")
        execute(location, f"GRANT {owner} TO {maker} WITH ADMIN OPTION")
        async with Database(as_role(location, owner)):
            pass
        self.grant(location, role)
        execute(as_role(location, maker), f"GRANT {owner} TO {role}")
        try:
            await is_refused(location, "belongs to the role", role=role)
        finally:
            execute(as_role(location, maker), f"REVOKE {owner} FROM {role}")
            execute(location, f"DROP ROLE {maker}")
