"""Locations on PostgreSQL servers: URLs as of libpq and SQLAlchemy, and libpq's keyword strings.

A location is understood as a whole, or refused. A message quotes nothing of a location that is not
understood, as any part of it may be a password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, unquote, urlencode

from openclaw_store.errors import InvalidDataError

_URL = re.compile(
    r"postgres(?:ql)?(?:\+asyncpg)?://([^/?]*)(?:/([^?]*))?(?:\?(.*))?", re.IGNORECASE | re.DOTALL
)
_PAIR = re.compile(
    r"\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|(?!')((?:[^\s\\]|\\.)*))(?=\s|\Z)", re.DOTALL
)
_HOST = re.compile(r"(/[^:]*|\[[\w:.%]+\]|[\w:]*:[\w:]*:[\w:.%]*|[\w.-]*)(?::(\d*))?")

_VERSIONS = {"TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"}
_CHOICES: Mapping[str, set[str]] = {
    "sslmode": {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"},
    "sslnegotiation": {"postgres", "direct"},
    "ssl_min_protocol_version": _VERSIONS,
    "ssl_max_protocol_version": _VERSIONS,
    "target_session_attrs": {
        "any", "primary", "standby", "read-write", "read-only", "prefer-standby"
    },
    "gsslib": {"gssapi", "sspi"},
    "engine": {"postgresql", "citus"},
}  # fmt: skip

_FILES = {
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
}
"""Options that the driver takes in a URL alone, and libpq's variables for them."""

_ARGUMENTS = {
    "user": "user",
    "password": "password",
    "dbname": "database",
    "sslmode": "ssl",
    "target_session_attrs": "target_session_attrs",
    "passfile": "passfile",
    "krbsrvname": "krbsrvname",
    "gsslib": "gsslib",
}
"""The driver's arguments for libpq's options."""

_SYNONYMS = {
    "database": "dbname",
    "ssl": "sslmode",
    "direct_tls": "sslnegotiation",
}
"""The driver's names for options of libpq."""

_SECRET = {"password", "sslpassword"}

OPTIONS = {
    *(*_ARGUMENTS, *_FILES, *_SECRET),
    *("host", "port", "application_name", "sslnegotiation", "engine"),
}
"""The options that a location may have."""

_ADVICE = {
    "service": "write the host, port, user and dbname of the service",
    "servicefile": "write the host, port, user and dbname of the service",
    "connect_timeout": "use Database(timeout=…)",
    "options": "give these settings to the role, as with ALTER ROLE … SET",
    **dict.fromkeys(
        (
            "hostaddr", "channel_binding", "client_encoding", "fallback_application_name",
            "gssencmode", "keepalives", "keepalives_idle", "keepalives_interval",
            "keepalives_count", "load_balance_hosts", "require_auth", "requirepeer", "replication",
            "sslcertmode", "sslcompression", "sslcrldir", "sslsni", "tcp_user_timeout",
        ),
        "leave it out",
    ),
}  # fmt: skip
"""Advice for options of libpq that the driver does not support."""

_ESCAPE = "in a user name or password, write %40 for @, %3A for :, %2F for / and %3F for ?"

_KEYWORDS = re.compile(rf"\s*(?:{'|'.join((*OPTIONS, *_SYNONYMS, *_ADVICE))})\s*=")


def is_postgresql(location: str) -> bool:
    """Return true if a location is meant for PostgreSQL, if only to be refused."""
    return (
        _is_pairs(location) or re.match(r"postgres(ql)?[:+]", location, re.IGNORECASE) is not None
    )


class ServerLocation:
    """A location on a server.

    Raises:
        InvalidDataError: If it is not understood.
    """

    def __init__(self, location: str) -> None:
        self.options: dict[str, str] = {}
        self._hosts: list[str] = []
        ports: list[str] = []
        given_ports: list[str] = []
        for name, value in _options(location):
            if name == "host":
                found = [_HOST.fullmatch(host) for host in value.split(",")]
                self._hosts += [_host(match and match[1]) for match in found]
                ports += [match[2] or "" for match in found if match]
            elif name == "port":
                given_ports += value.split(",")
            else:
                self.options[name] = value
        ports = given_ports or ports
        if len(ports) == 1:
            ports *= max(1, len(self._hosts))
        if ports and len(ports) != max(1, len(self._hosts)):
            raise refused("must have one port for all hosts, or one for each")
        self._ports = [_port(port or "5432") for port in ports] if any(ports) else []

    def __str__(self) -> str:
        """Return the URL without passwords, for messages and for libpq."""
        user, password = quote(self.options.get("user", ""), safe=""), self.options.get("password")
        login = f"{user}{':***' if password else ''}@" if user or password else ""
        quoted = [quote(host, safe=":") for host in self._hosts]
        hosts = [f"[{host}]" if ":" in host else host for host in quoted] or [""]
        if self._ports:
            hosts = [f"{host}:{port}" for host, port in zip(hosts, self._ports, strict=True)]
        shown = self.options.keys() - {"user", "password", "dbname", "sslpassword", "engine"}
        query = urlencode({name: self.options[name] for name in sorted(shown)}, quote_via=quote)
        database = quote(self.options.get("dbname", ""), safe="")
        return f"postgresql://{login}{','.join(hosts)}/{database}{'?' if query else ''}{query}"

    @property
    def is_citus(self) -> bool | None:
        """True if the option `engine` names Citus; `None` without that option."""
        engine = self.options.get("engine")
        return None if engine is None else engine == "citus"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the driver's `connect`; it looks the missing ones up itself."""
        given = self.options
        arguments: dict[str, Any] = {
            argument: given[name] for name, argument in _ARGUMENTS.items() if name in given
        }
        for name, values in (("host", self._hosts), ("port", self._ports)):
            if values:
                arguments[name] = values if len(self._hosts) > 1 else values[0]
        if len(self._hosts) > 1:  # `Connector` needs both
            arguments.setdefault("port", [5432] * len(self._hosts))
        if "sslnegotiation" in given:
            arguments["direct_tls"] = given["sslnegotiation"] == "direct"
        files = {name: given[name] for name in (*_FILES, "sslpassword") if name in given}
        if files:
            arguments["dsn"] = f"postgresql://?{urlencode(files, quote_via=quote)}"
        return arguments

    def files(self) -> dict[str, str]:
        """Return libpq's variables for TLS, as the driver finds them."""
        names = {**_FILES, "sslnegotiation": "PGSSLNEGOTIATION"}
        found = {name: self.options.get(one) or os.environ.get(name) for one, name in names.items()}
        return {name: value for name, value in found.items() if value}


def _is_pairs(location: str) -> bool:
    return _KEYWORDS.match(location) is not None


def refused(reason: str) -> InvalidDataError:
    """Return the error of a location."""
    return InvalidDataError("db_path", reason)


def _options(location: str) -> Iterator[tuple[str, str]]:
    """Yield the options that have a value, by their names in libpq."""
    for given, value in _of_keywords(location) if _is_pairs(location) else _of_url(location):
        name = _SYNONYMS.get(given, given)
        if given == "direct_tls":
            value = {"true": "direct", "false": "postgres"}.get(value, value)
        if name in _ADVICE:
            raise refused(f"has the option {name}, which is not supported: {_ADVICE[name]}")
        if name not in OPTIONS:
            raise refused(f"has an unknown option: use {', '.join(sorted(OPTIONS))}")
        if not value.isprintable():
            raise refused(f"has a character in {name} that cannot be printed")
        if value and value not in _CHOICES.get(name, {value}):
            raise refused(f"has a wrong {name}: use {', '.join(sorted(_CHOICES[name]))}")
        if value:
            yield name, value


def _of_keywords(location: str) -> Iterator[tuple[str, str]]:
    position = 0
    while location[position:].strip():
        match = _PAIR.match(location, position)
        if match is None:
            raise refused("has name=value pairs that cannot be read: write quotes around a value")
        name, quoted, plain = match.groups()
        yield name, re.sub(r"\\(.)", r"\1", plain if quoted is None else quoted, flags=re.DOTALL)
        position = match.end()


def _of_url(location: str) -> Iterator[tuple[str, str]]:
    match = _URL.fullmatch(location)
    if match is None:
        if re.match(r"postgres(ql)?\+(?!asyncpg://)\w*://", location, re.IGNORECASE):
            raise refused("names the driver of another program: begin it with postgresql://")
        raise refused("is neither a path nor a URL that begins with postgresql://")
    authority, database, query = (part or "" for part in match.groups())
    if "@" in database or "@" in query:
        raise refused(f"has an @ behind its host: {_ESCAPE}")
    login, _, hosts = authority.rpartition("@")
    user, _, password = login.partition(":")
    pairs = [("user", user), ("password", password), ("dbname", database)]
    options = [pair.partition("=")[::2] for pair in query.split("&")]
    if hosts.startswith(":"):
        pairs.append(("port", hosts[1:]))
    elif not any(name == "host" for name, _ in options):  # which libpq prefers
        pairs.append(("host", hosts))
    for name, value in (*pairs, *options):
        if name:
            try:
                yield name, unquote(value, errors="strict")
            except UnicodeDecodeError:
                raise refused("has a % escape that is no text") from None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536):
        raise refused(f"has a port that is no number from 1 to 65535: {_ESCAPE}")
    return int(text)


def _host(host: str | None) -> str:
    host = (host or "").strip("[]")
    if host.startswith("/"):  # as a socket does
        return host
    try:
        if ":" in host:  # without an @, a password would pass for a part of such an address
            ip_address(host)
        if host.encode("idna"):
            return host
    except ValueError:
        pass
    raise refused(f"has a host that is no name or address, or a port that is no number: {_ESCAPE}")
