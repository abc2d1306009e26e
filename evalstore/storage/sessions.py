"""What each session with PostgreSQL is set to, whatever the defaults of its role, its database and this environment.

A direct connection keeps what is set once, after connecting. A pooler may give each transaction another session. So behind a
pooler every transaction begins with all settings, in the message that begins it, and no session that others use is changed.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import psycopg
from psycopg import generators, pq, sql
from psycopg.abc import PQGen

# The environment (PGDATESTYLE, PGTZ) and `ALTER ROLE` or `ALTER DATABASE … SET` may have set each of these to something else.
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
# The server's side of a connection, which is a pooler's where there is one.
_SOCKET: Final = {
    "tcp_user_timeout": "10000",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
# Time-outs with the version that brought them. Ours bound each statement and each pause; a pool keeps idle sessions.
_UNBOUNDED: Final = {"idle_session_timeout": 140000, "transaction_timeout": 170000}
# Every transaction that stores is durable. https://www.postgresql.org/docs/current/runtime-config-wal.html#GUC-SYNCHRONOUS-COMMIT
DURABLE: Final = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit') "
    "WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, {})"
)


class Session(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose transactions begin with `per_transaction`, a statement, where there is one."""

    per_transaction = b""

    def _start_query(self) -> PQGen[None]:
        # psycopg's own, with another statement in the same message or pipeline.
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
    """Set the session, or each of its transactions where a pooler is between, to _SETTINGS and what is `wanted`.

    One statement. The search path is `schema` alone, or else the connection's first schema alone: nothing is found, and nothing
    is created, in another. Raises what psycopg raises.
    """
    version = raw.info.server_version
    unbounded = {name: "0" for name, since in _UNBOUNDED.items() if version >= since}
    settings = {**_SETTINGS, **unbounded, **wanted}
    path = settings.pop("search_path", None)
    settings.pop("synchronous_commit", None)
    # A pooler has no process of PostgreSQL to name when a client connects, and makes up a number.
    is_pooled = sql.SQL("pg_backend_pid() <> {}").format(raw.info.backend_pid)
    first = sql.SQL("coalesce(quote_ident(current_schema()), current_setting('search_path'))")
    fixed = first if schema is None else sql.SQL("quote_ident({})").format(schema)
    columns = [
        is_pooled,
        *(_set(name, value, is_pooled) for name, value in {**_SOCKET, **settings}.items()),
        sql.SQL(DURABLE).format(is_pooled),
        *([] if path is None else [_set("search_path", path, is_pooled)]),
        sql.SQL("set_config('search_path', {}, {})").format(fixed, is_pooled),
    ]
    raw.autocommit = True
    query = sql.SQL("SELECT {}").format(sql.SQL(", ").join(columns))
    ((pooled, *_, search_path),) = raw.execute(query, prepare=False).fetchall()
    raw.autocommit = False
    # Not by the setting above: that is of the session, and a transaction cannot change its own after its first statement.
    raw.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    if pooled:
        local = sql.SQL("true")
        each = [_set(name, value, local) for name, value in {**settings, "search_path": search_path}.items()]
        query = sql.SQL("SELECT {}").format(sql.SQL(", ").join([*each, sql.SQL(DURABLE).format(local)]))
        raw.per_transaction = query.as_bytes(raw)


def _set(name: str, value: str, is_local: sql.SQL | sql.Composed) -> sql.Composed:
    return sql.SQL("set_config({}, {}, {})").format(name, value, is_local)


def split_options(options: str) -> tuple[dict[str, str], str]:
    """The settings in an address's `options` (`-c name=value`, `--name=value`), and the rest, which is the server's to read.

    Poolers ignore or refuse start-up options, so settings are sent later. https://www.postgresql.org/docs/current/libpq-connect.html
    """
    words = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|[^\s\\])+", options)]
    settings, rest = {}, []
    while words:
        word = words.pop(0)
        given = words.pop(0) if word == "-c" and words else re.sub("^(-c|--)", "", word) if word[:2] in {"-c", "--"} else ""
        name, found, value = given.partition("=")
        if found:
            settings[name.replace("-", "_")] = value
        else:
            rest.append(re.sub(r"([\s\\])", r"\\\1", word))
    return settings, " ".join(rest)
