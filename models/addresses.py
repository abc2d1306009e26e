"""Check the addresses of servers and object stores. Errors never repeat an address: it may hold a password."""

import ipaddress
import re
from typing import Final, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

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
# A subset of redis-py's options: evalstore itself sets timeouts, retries and the form of replies.
REDIS_OPTIONS: Final = {"db": _DATABASE, "username": _ANY, "password": _ANY, "client_name": r"[!-~]+", "protocol": "2|3"}
REDIS_TLS_OPTIONS: Final = REDIS_OPTIONS | _TLS

_REDIS_SCHEMES: Final[dict[str, Literal["server", "sentinel", "cluster"]]] = {
    "redis": "server",
    "rediss": "server",
    "unix": "server",
    "redis+sentinel": "sentinel",
    "rediss+sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
}
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")
_ESCAPES: Final = "in a password / is written %2F, # %23, ? %3F, @ %40 and % %25"
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def check_database_url(url: str) -> None:
    """Raise ValueError, which says what was expected, for an address that libpq would refuse at each attempt to connect.

    libpq's own message may show part of a password.
    https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS
    """
    if re.match(r"postgres(ql)?\+\w+://", url, re.ASCII):
        raise ValueError("expected an address that begins with postgresql://, without the driver that SQLAlchemy adds")
    if not url.startswith(("postgresql://", "postgres://")):
        raise ValueError("expected an address that begins with postgresql://")
    location, _, query = url.partition("://")[2].partition("?")
    user, at, hosts = location.partition("/")[0].rpartition("@")
    ports = [re.fullmatch(r"(?:\[[^]]*\]|[^:\[\]]*)(?::(\d*))?", host, re.ASCII) for host in hosts.split(",")]
    if "@" in user or ("@" in location and not at) or not all(port and 0 < int(port[1] or 1) < 65536 for port in ports):
        raise ValueError(f"expected a host, and a port from 1 to 65535; {_ESCAPES}")
    modes = [value for name, value in parse_qsl(query, keep_blank_values=True) if name == "sslmode"]
    if not set(modes) <= set(_SSL_MODES):
        raise ValueError(f"sslmode: expected one of {', '.join(_SSL_MODES)}{did_you_mean(modes[0], _SSL_MODES)}")


class RedisAddress(NamedTuple):
    """An address of Redis. `url` is what redis-py takes; of Sentinel and Cluster, it names the first of `nodes`.

    `primary` is the name of the primary that Sentinel watches. `sentinel_user` and `sentinel_password` are for Sentinel itself.
    """

    kind: Literal["server", "sentinel", "cluster"]
    url: str
    nodes: tuple[tuple[str, int], ...] = ()
    primary: str = ""
    sentinel_user: str | None = None
    sentinel_password: str | None = None


def parse_redis_url(url: str) -> RedisAddress:
    """Parse an address. Raises ValueError, which says what was expected, and which never repeats the address."""
    scheme, separator, rest = url.partition("://")
    kind = _REDIS_SCHEMES.get(scheme) if separator else None
    if kind is None:
        raise ValueError(
            "expected an address that begins with redis://, rediss://, unix://, redis+sentinel://, rediss+sentinel://, "
            "redis+cluster:// or rediss+cluster://"
        )
    if kind == "server":
        _check_redis_server(url)
        return RedisAddress("server", url)
    located, _, query = rest.partition("?")
    authority_, _, path = located.partition("/")
    user, at, hosts = authority_.rpartition("@")
    primary, database = ("", path) if kind == "cluster" else (unquote(path.partition("/")[0]), path.partition("/")[2])
    if kind == "sentinel" and not re.fullmatch(r"[A-Za-z0-9._-]+", primary, re.ASCII):
        raise ValueError(
            f"expected the name of the primary after the hosts, like redis+sentinel://h1:26379,h2:26379/NAME/0; {_ESCAPES}"
        )
    options = parse_qsl(query, keep_blank_values=True)
    if kind == "cluster" and {database or "0", dict(options).get("db", "0")} != {"0"}:
        raise ValueError("expected no database but 0: a cluster has no others")
    of_sentinel = dict(option for option in options if option[0] in _SENTINEL_OPTIONS)
    if of_sentinel and kind != "sentinel":
        raise ValueError(f"{next(iter(of_sentinel))} is an option of redis+sentinel://")
    others = urlencode([option for option in options if option[0] not in _SENTINEL_OPTIONS])
    servers = []
    for host in hosts.split(","):
        if not host:
            raise ValueError(f"expected hosts and ports, separated by commas; {_ESCAPES}")
        server = f"{scheme.partition('+')[0]}://{user}{at}{host}/{database}" + (f"?{others}" if others else "")
        _check_redis_server(server)
        servers.append(server)
    default_port = 26379 if kind == "sentinel" else 6379
    parts = [urlsplit(server) for server in servers]
    nodes = tuple((part.hostname or "localhost", part.port or default_port) for part in parts)
    password = of_sentinel.get("sentinel_password")
    return RedisAddress(kind, servers[0], nodes, primary, of_sentinel.get("sentinel_username"), password)


def _check_redis_server(url: str) -> None:
    """Raise ValueError for the address of one server that redis-py refuses or reads in another way."""
    try:
        parts = urlsplit(url)
        is_port = parts.port != 0
    except ValueError:
        is_port = False
    if not is_port or parts.fragment:
        raise ValueError(f"expected a host, and a port from 1 to 65535; {_ESCAPES}")
    if parts.scheme == "unix" and parts.path in {"", "/"}:
        raise ValueError("expected the path of a socket, like unix:///run/redis.sock?db=0")
    # redis-py reads any path that is no number as database 0.
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


def check_host(host: str) -> str:
    """Return the name or address of a host to listen on, an IPv6 address without brackets. Raises ValueError."""
    bare = host[1:-1] if re.fullmatch(r"\[.*:.*\]", host) else host
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", bare, re.ASCII):
            raise ValueError("expected a host name, or an IPv4 or IPv6 address, without a port") from None
    return bare


def url_of(host: str, port: int | str) -> str:
    """Return the URL with which a program on this machine reaches a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://{authority(reachable, port)}"


def authority(host: str, port: int | str) -> str:
    """Return `host:port` for a URL, with an IPv6 address in brackets (RFC 3986, 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_BUCKET = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)[a-z0-9](?:[a-z0-9-]|\.(?!\.)){1,61}[a-z0-9]", re.ASCII)


def parse_store_url(url: str) -> tuple[Literal["file", "s3"], str, str]:
    """Split the address of an object store: ("file", absolute folder, "") or ("s3", bucket, prefix).

    Raises ValueError, which says what was expected.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in {"file", "s3"}:
        raise ValueError("expected file:///absolute/folder or s3://bucket/prefix")
    if "?" in rest or "#" in rest or "\0" in unquote(rest):
        raise ValueError("expected no ? and no #: in a folder's name write %3F and %23")
    if scheme == "file":
        host, slash, _ = rest.partition("/")
        if host not in {"", "localhost"} or not slash:
            raise ValueError("expected an absolute path, with three slashes: file:///absolute/folder")
        folder = unquote(rest.removeprefix("localhost"))
        if folder.strip("/") == "" or ".." in folder.split("/"):
            raise ValueError("expected a folder below /, and no .. in its path")
        return "file", folder, ""
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("expected s3:// and a bucket's name: 3 to 63 of a-z 0-9 . -")
    prefix = prefix.strip("/")
    if any(part in {"", ".", ".."} for part in prefix.split("/")) and prefix:
        raise ValueError("expected a prefix without empty parts, . and ..")
    return "s3", bucket, prefix


def check_endpoint(url: str) -> str:
    """Return the address of an HTTP server. Raises ValueError, which says what was expected."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("expected a host, and a port from 0 to 65535") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("expected an address like https://host:port")
    if parts.username is not None:
        raise ValueError("expected no user or password in it: credentials come as boto3 finds them")
    return url
