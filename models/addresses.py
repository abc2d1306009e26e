"""The addresses of PostgreSQL and Redis: what each may hold. Nothing of one is ever repeated, as it may hold a password."""

import re
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from models.validation_errors import did_you_mean

_DATABASE: Final = r"\d{1,5}"
_ANY: Final = r"(?s).+"
_TLS: Final = {
    "ssl_ca_certs": _ANY,
    "ssl_ca_path": _ANY,
    "ssl_certfile": _ANY,
    "ssl_keyfile": _ANY,
    "ssl_password": _ANY,
    "ssl_ciphers": _ANY,
    "ssl_cert_reqs": "none|optional|required",
    "ssl_check_hostname": "(?i)true|false|yes|no|1|0",
}
# Of what redis-py takes: not how long it waits, how often it tries, or how it gives answers. That is ours to say.
REDIS_OPTIONS: Final = {"db": _DATABASE, "username": _ANY, "password": _ANY, "client_name": r"[!-~]+", "protocol": "2|3"}
REDIS_TLS_OPTIONS: Final = REDIS_OPTIONS | _TLS

_ESCAPES: Final = "in a password / is written %2F, # %23, ? %3F, @ %40 and % %25"
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def check_database_url(url: str) -> None:
    """Raises ValueError, which says what was expected, for what libpq would only find out by connecting, again and again, and
    then tell with half a password in it. https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS"""
    if re.match(r"postgres(ql)?\+\w+://", url, re.ASCII):
        raise ValueError("expected an address that begins with postgresql://, without the driver that SQLAlchemy adds")
    if not url.startswith(("postgresql://", "postgres://")):
        raise ValueError("expected an address that begins with postgresql://")
    place, _, query = url.partition("://")[2].partition("?")
    user, at, hosts = place.partition("/")[0].rpartition("@")
    ports = [re.fullmatch(r"(?:\[[^]]*\]|[^:\[\]]*)(?::(\d*))?", host, re.ASCII) for host in hosts.split(",")]
    if "@" in user or ("@" in place and not at) or not all(port and 0 < int(port[1] or 1) < 65536 for port in ports):
        raise ValueError(f"expected a host, and a port from 1 to 65535; {_ESCAPES}")
    modes = [value for name, value in parse_qsl(query, keep_blank_values=True) if name == "sslmode"]
    if not set(modes) <= set(_SSL_MODES):
        raise ValueError(f"sslmode: expected one of {', '.join(_SSL_MODES)}{did_you_mean(modes[0], _SSL_MODES)}")


def check_redis_url(url: str) -> None:
    """Raises ValueError, which says what was expected, for what redis-py would refuse, or take for something else."""
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("expected an address that begins with redis://, rediss:// or unix://")
    try:
        parts = urlsplit(url)
        is_port = parts.port != 0
    except ValueError:
        is_port = False
    if not is_port or parts.fragment:
        raise ValueError(f"expected a host, and a port from 1 to 65535; {_ESCAPES}")
    if parts.scheme == "unix" and parts.path in {"", "/"}:
        raise ValueError("expected the path of a socket, like unix:///run/redis.sock?db=0")
    # redis-py would take database 0 for any path that is no number.
    if parts.scheme != "unix" and not re.fullmatch(rf"/?|/{_DATABASE}", parts.path, re.ASCII):
        raise ValueError("expected a database number after the host, like redis://host:6379/0")
    options = REDIS_TLS_OPTIONS if parts.scheme == "rediss" else REDIS_OPTIONS
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in _TLS and name not in options:
            raise ValueError(f"{name} is an option of rediss://")
        if name not in options:
            known = ", ".join(options)
            raise ValueError(f"expected no options but {known}{did_you_mean(name, options)}")
        if not re.fullmatch(options[name], value, re.ASCII):
            raise ValueError(f"not a value that the option {name} can have")
