"""Locations in the forms that people write: each is understood, or refused without its password."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import URL, make_url, text

import openclaw_store.backends.postgresql.backend as backend_module
from openclaw_store import Database, InvalidDataError, UnavailableError
from openclaw_store.backends import PostgreSQL, SQLite, backend_of

COUNT = 5000
SEED = 20261130

Case = tuple[Any, dict[str, Any] | Path | None]
"""A location, and its meaning: the driver's arguments, a file, or `None` if it may be refused."""


class Generator:
    """Writes locations as people do, each with two halves of a password around a character."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.number = 0
        self.forms: list[Callable[[], Case]] = [
            self.libpq_url, self.raw_url, self.sqlalchemy_url, self.keywords, self.query,
            self.wrong_option, self.without_scheme, self.mutated, self.file,
        ]  # fmt: skip

    def case(self) -> Case:
        self.number += 1
        self.halves = f"left{self.number:05}", f"right{self.number:05}"
        self.password = self.random.choice("@:/?#%&=+ '\\\"é;,[]$").join(self.halves)
        return self.random.choice(self.forms)()

    def parts(self) -> dict[str, Any]:
        """Return the driver's arguments, without a host."""
        choice = self.random.choice
        given = {"user": choice(["anna", "anna@corp", "ånna"]), "password": self.password}
        given["database"] = choice(["cluster", "a b", "100%"])
        return given

    def scheme(self) -> str:
        return self.random.choice(["postgres", "postgresql", "postgresql+asyncpg", "POSTGRESQL"])

    def options(self) -> dict[str, str]:
        known = {
            "sslmode": "require", "sslrootcert": "/etc/ca.pem", "application_name": "my app",
            "target_session_attrs": "read-write", "passfile": "/etc/pgpass", "sslkey": "k",
        }  # fmt: skip
        return {name: known[name] for name in self.random.sample(sorted(known), 2)}

    def libpq_url(self) -> Case:
        given, options = self.parts(), self.options()
        hosts = self.random.choice([["db1"], ["::1"], ["/var/run"], ["db1", "10.0.0.2"], []])
        ports = [self.random.randrange(1, 65536) for _ in hosts]
        pairs = [
            (f"[{host}]" if ":" in host else quote(host, safe="")) + f":{port}"
            for host, port in zip(hosts, ports, strict=True)
        ]
        user, password, database = (
            quote(given[name], safe="") for name in ("user", "password", "database")
        )
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
        location = f"{self.scheme()}://{user}:{password}@{','.join(pairs)}/{database}?{query}"
        if hosts:
            one = len(hosts) == 1
            given |= {"host": hosts[0] if one else hosts, "port": ports[0] if one else ports}
        return location, given | {"application_name": options.get("application_name")}

    def raw_url(self) -> Case:
        """Return a URL in which nothing is escaped; `/`, `?` and `%` then have another meaning."""
        given = self.parts() | {"host": "db1", "database": "cluster"}
        location = f"{self.scheme()}://{given['user']}:{self.password}@db1/cluster"
        return location, None if set("/?%") & set(self.password) else given

    def sqlalchemy_url(self) -> Case:
        given = self.parts() | {"host": "db1", "port": 5433, "database": "cluster"}
        driver = self.random.choice(["postgresql", "postgresql+asyncpg", "postgresql+psycopg2"])
        url = URL.create(
            driver, given["user"], self.password, "db1", 5433, "cluster", {"ssl": "prefer"}
        )
        is_ours = "psycopg" not in driver
        return url.render_as_string(hide_password=False), given if is_ours else None

    def keywords(self) -> Case:
        given = self.parts() | {"host": "db1"}
        is_quoted = self.random.random() < 0.7

        def value(text: str) -> str:
            text = text.replace("\\", "\\\\").replace("'", "\\'")
            return f"'{text}'" if is_quoted else text

        pairs = [("host", "db1"), ("user", given["user"]), ("password", self.password)]
        pairs.append(("dbname", given["database"]))
        self.random.shuffle(pairs)
        equals = self.random.choice(["=", " = "])
        location = " ".join(f"{name}{equals}{value(one)}" for name, one in pairs)
        is_clear = is_quoted or not {" "} & set(self.password + given["database"])
        return location, given if is_clear else None

    def query(self) -> Case:
        given = self.parts() | {"host": "db1", "database": "cluster"}
        password, user = quote(self.password, safe=""), quote(given["user"], safe="")
        return f"{self.scheme()}://db1/cluster?password={password}&user={user}", given

    def wrong_option(self) -> Case:
        name = self.random.choice(["service", "sslmode", "port", "nonsense", self.halves[0]])
        password = quote(self.password, safe="")
        return f"{self.scheme()}://anna:{password}@db1/cluster?{name}={self.halves[1]}", None

    def without_scheme(self) -> Case:
        password, form = self.password.replace("/", ""), self.random.randrange(8)
        login = f"anna:{password}@db1/cluster"
        return [
            login, f"//{login}", f"postgresql:/{login}", f"jdbc:postgresql://{login}",
            Path(f"postgresql://{login}"), f"postgresql://{login}".encode(),
            f"Host=db1;Username=anna;Password={password}", f"DATABASE_URL=postgres://{login}",
        ][form], None  # fmt: skip

    def mutated(self) -> Case:
        """Return a URL with one character too many, or one too few behind the user name."""
        location = f"postgresql://anna:{quote(self.password, safe='')}@db1:5433/cluster?ssl=prefer"
        if self.random.random() < 0.5:
            place = self.random.randrange(len("postgresql://anna:"), len(location))
            return location[:place] + location[place + 1 :], None
        place = self.random.randrange(len(location))
        return location[:place] + self.random.choice("@:/?#%&=[],\0 '") + location[place:], None

    def file(self) -> Case:
        name = self.random.choice(["cluster.db", "a=b.db", "host.db", "postgresql.db", "a@b.db"])
        path = self.random.choice(["", "./", "data/", "/srv/a:b@c/"]) + name
        return self.random.choice([path, Path(path), f"sqlite:///{path}"]), Path(path).absolute()


def test_locations_are_understood_or_refused_in_one_line_without_their_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_module, "find_spec", lambda _: True)  # half of the time
    generator = Generator(SEED)
    understood = refused = 0
    for _ in range(COUNT):
        location, meaning = generator.case()
        try:
            backend: Any = backend_of(location)
        except InvalidDataError as error:
            assert meaning is None, location
            shown = str(error)
            refused += 1
        else:
            understood += 1
            shown = backend.location
            if isinstance(backend, SQLite):
                assert backend.path == meaning
            else:
                assert_meaning(backend, meaning, location)
        assert shown.isprintable()
        assert not any(half in shown for half in generator.halves), (location, shown)

    assert min(understood, refused) > COUNT // 5


def assert_meaning(backend: PostgreSQL, meaning: Any, location: str) -> None:
    options = backend._location
    arguments = {**options.arguments(), "application_name": options.options.get("application_name")}
    if meaning is not None:
        assert {name: arguments.get(name) for name in meaning} == meaning, location
    again = backend_of(backend.location)
    assert again.location == backend.location


@pytest.mark.parametrize(
    "given",
    [
        "postgresql//a:hunter2@db/x",
        "PGPASSWORD=hunter2 PGHOST=db",
        "db/x?user=a&password=hunter2",
        "a:hunter2@db/x",
    ],
)
def test_no_file_is_named_after_a_password(given: str) -> None:
    with pytest.raises(InvalidDataError, match="looks like a URL") as caught:
        backend_of(given)

    assert "hunter2" not in str(caught.value)


@pytest.mark.sqlite
@pytest.mark.parametrize("given", ["~/cluster.db", Path("~/cluster.db"), "sqlite:///~/cluster.db"])
def test_home_folder_is_not_made_under_the_name_that_shells_have_for_it(given: str | Path) -> None:
    with pytest.raises(InvalidDataError, match="the full path"):
        Database(given)

    assert Database("~cluster.db").db_path == "~cluster.db"


@pytest.mark.parametrize("host", ["anna:hunter2%3Asecret:5432", "[anna:hunter2]", "anna:1:hunter2"])
def test_login_without_its_at_sign_is_no_host(host: str) -> None:
    """It passed for an address of IPv6, and was shown."""
    with pytest.raises(InvalidDataError, match=r"has a (host|port) that is n") as caught:
        backend_of(f"postgresql://{host}/cluster")

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("given", ["./a:b@c.db", "/tmp/password=1.db", "a@b.db", "../pwd=.db"])
def test_path_with_such_letters_is_a_file(given: str) -> None:
    assert isinstance(backend_of(given), SQLite)


def test_options_of_tls_reach_the_driver_and_the_programs_of_the_server() -> None:
    backend: Any = backend_of("postgresql://db/cluster?direct_tls=true&sslrootcert=/a%20b/ca.pem")
    options = backend._location

    assert options.arguments()["direct_tls"] is True
    assert options.arguments()["dsn"] == "postgresql://?sslrootcert=%2Fa%20b%2Fca.pem"
    assert options.files() == {"PGSSLNEGOTIATION": "direct", "PGSSLROOTCERT": "/a b/ca.pem"}


@pytest.mark.postgresql
async def test_server_is_reached_by_a_keyword_string_and_an_application_name(
    location: str, migrated_postgresql: str
) -> None:
    given = make_url(migrated_postgresql)
    words = f"host={given.host} port={given.port} user={given.username} dbname='{given.database}'"

    words += " sslmode=disable application_name='my app'"
    async with Database(words) as database, database.session() as session:
        shown = await session.scalar(text("SHOW application_name"))

    assert shown == "my app"
    assert database.db_path.startswith(f"postgresql://{given.username}@{given.host}:{given.port}/")


@pytest.mark.postgresql
async def test_required_tls_is_not_left_out(location: str) -> None:
    with pytest.raises(UnavailableError, match="SSL"):
        await Database(f"{location}?sslmode=require").initialize()


@pytest.mark.postgresql
async def test_missing_certificate_of_the_server_is_named(location: str, tmp_path: Path) -> None:
    url = f"{location}?sslmode=verify-full&sslrootcert={tmp_path}/none.pem"

    with pytest.raises(UnavailableError, match="check the server, then try again"):
        await Database(url).initialize()
