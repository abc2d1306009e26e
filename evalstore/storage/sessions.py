"""Set up each PostgreSQL session, independent of the defaults of its role, its database and the environment.

A direct connection is set up once, after connecting. A pooler may give each transaction another session. So behind a pooler
every transaction begins with all settings, in the message that begins it. Sessions that others use stay unchanged.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import psycopg
from psycopg import generators, pq, sql
from psycopg.abc import PQGen
from psycopg.adapt import Dumper
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg.types.string import BytesBinaryDumper

from models.record import jsonb

# The environment (PGDATESTYLE, PGTZ), `ALTER ROLE` or `ALTER DATABASE … SET` may have changed these settings.
_SETTINGS: Final = {
    "default_transaction_isolation": "read committed",
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "jit": "off",
}
# Settings of the server's socket. Behind a pooler this is the socket to the pooler.
_SOCKET: Final = {
    "tcp_user_timeout": "10000",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
# Time-outs to disable, with the server version that added them. evalstore bounds statements and pauses, but pools keep idle
# sessions.
_UNBOUNDED: Final = {"idle_session_timeout": 140000, "transaction_timeout": 170000}
# Every transaction that stores is durable. https://www.postgresql.org/docs/current/runtime-config-wal.html#GUC-SYNCHRONOUS-COMMIT
DURABLE: Final = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit') "
    "WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, {})"
)


_HAS_CITUS: Final = "EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'citus')"


class Session(psycopg.Connection[tuple[Any, ...]]):
    """A connection that runs the statement `per_transaction`, if it is set, at the start of each transaction."""

    per_transaction = b""
    has_citus = False

    def _start_query(self) -> PQGen[None]:
        # Overrides psycopg's method, to send a second statement in the same message or pipeline.
        if not self.per_transaction or self.autocommit or self.pgconn.transaction_status != pq.TransactionStatus.IDLE:
            yield from super()._start_query()
        elif self._pipeline:
            yield from self._exec_command(self._get_tx_start_command())
            yield from self._exec_command(self.per_transaction)
            yield from self._pipeline._sync_gen()  # noqa: SLF001
        else:
            self.pgconn.send_query(self._get_tx_start_command() + b"; " + self.per_transaction)
            for result in (yield from generators.execute(self.pgconn)):
                if result.status not in {pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK}:
                    raise psycopg.errors.error_from_result(result, encoding="utf-8")


def set_up(raw: Session, wanted: Mapping[str, str], schema: str | None = None) -> None:
    """Apply _SETTINGS and `wanted` to the session, in one statement. Behind a pooler apply them to each transaction.

    The search path has one schema: `schema`, or else the connection's first schema. So no table in another schema is found or
    created. Raises psycopg's errors.
    """
    version = raw.info.server_version
    unbounded = {name: "0" for name, since in _UNBOUNDED.items() if version >= since}
    settings = {**_SETTINGS, **unbounded, **wanted}
    path = settings.pop("search_path", None)
    settings.pop("synchronous_commit", None)
    # A pooler reports an invented process id at connecting, so the ids differ behind a pooler.
    is_pooled = sql.SQL("pg_backend_pid() <> {}").format(raw.info.backend_pid)
    first = sql.SQL("coalesce(quote_ident(current_schema()), current_setting('search_path'))")
    fixed = first if schema is None else sql.SQL("quote_ident({})").format(schema)
    columns = [
        is_pooled,
        sql.SQL(_HAS_CITUS),
        *(_set(name, value, is_pooled) for name, value in {**_SOCKET, **settings}.items()),
        sql.SQL(DURABLE).format(is_pooled),
        *([] if path is None else [_set("search_path", path, is_pooled)]),
        sql.SQL("set_config('search_path', {}, {})").format(fixed, is_pooled),
    ]
    raw.autocommit = True
    query = sql.SQL("SELECT {}").format(sql.SQL(", ").join(columns))
    ((pooled, raw.has_citus, *_, search_path),) = raw.execute(query, prepare=False).fetchall()
    raw.autocommit = False
    # default_transaction_isolation cannot help behind a pooler: a transaction cannot change its isolation after its first
    # statement.
    raw.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    if pooled:
        local = sql.SQL("true")
        each = [_set(name, value, local) for name, value in {**settings, "search_path": search_path}.items()]
        query = sql.SQL("SELECT {}").format(sql.SQL(", ").join([*each, sql.SQL(DURABLE).format(local)]))
        raw.per_transaction = query.as_bytes(raw)


def has_citus(conn: psycopg.Connection[Any]) -> bool:
    """Tell whether the tables may be distributed by Citus. This is found out once for each connection."""
    return isinstance(conn, Session) and conn.has_citus


class _JsonbDumper(Dumper):
    format = pq.Format.BINARY
    oid = psycopg.adapters.types["jsonb"].oid

    def dump(self, obj: dict[str, Any]) -> bytes:
        return b"\x01" + jsonb(obj)


def register_types(raw: psycopg.Connection[Any]) -> None:
    """Convert jsonb and bytea as the stored events need it."""
    set_json_dumps(jsonb, raw)
    set_json_loads(msgspec.json.decode, raw)
    # COPY chooses a dumper for each column. The default ones of these types look for a wrapper around each value.
    raw.adapters.register_dumper(None, BytesBinaryDumper)
    raw.adapters.register_dumper(None, _JsonbDumper)


def _set(name: str, value: str, is_local: sql.SQL | sql.Composed) -> sql.Composed:
    return sql.SQL("set_config({}, {}, {})").format(name, value, is_local)


def split_options(options: str) -> tuple[dict[str, str], str]:
    """Split an address's `options` into settings (`-c name=value`, `--name=value`) and the rest, which the server reads.

    Poolers ignore or refuse start-up options, so settings are sent later.
    https://www.postgresql.org/docs/current/libpq-connect.html
    """
    words = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|[^\s\\])+", options)]
    settings, rest = {}, []
    while words:
        word = words.pop(0)
        option = words.pop(0) if word == "-c" and words else re.sub("^(-c|--)", "", word) if word[:2] in {"-c", "--"} else ""
        name, equals, value = option.partition("=")
        if equals:
            settings[name.replace("-", "_")] = value
        else:
            rest.append(re.sub(r"([\s\\])", r"\\\1", word))
    return settings, " ".join(rest)
