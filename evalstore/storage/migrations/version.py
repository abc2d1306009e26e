"""Find the revision of the schema: in our version table, or by the columns of our tables.

Releases up to revision 0008 kept the revision in `alembic_version`. Another application's Alembic may share that table, so
these installations are recognised by their tables alone. docs/decisions/0029-a-version-table-of-our-own.md
"""

from typing import Final

from sqlalchemy import Connection

from evalstore.storage import database
from models.errors import SchemaMismatch

VERSION_TABLE: Final = "evalstore_schema_version"

_EXISTS: Final = "SELECT to_regclass(quote_ident(current_schema()) || '.evalstore_schema_version') IS NOT NULL"
_READ: Final = "SELECT max(version_num) FROM evalstore_schema_version"


def recorded(conn: Connection) -> str | None:
    """Return the revision in our version table, or None if the current schema has no such table."""
    with database.driver(conn).cursor() as cursor:
        ((exists,),) = cursor.execute(_EXISTS).fetchall()
        if not exists:
            return None
        ((revision,),) = cursor.execute(_READ).fetchall()
        return None if revision is None else str(revision)


def schema_of(conn: Connection) -> str:
    """Return the schema in which this connection creates tables. Raises SchemaMismatch if there is none."""
    ((schema,),) = database.driver(conn).execute("SELECT current_schema()").fetchall()
    if schema is None:
        raise SchemaMismatch("the connection's search_path names no schema that exists: create the schema, or change the path")
    return str(schema)


# The columns that each of these revisions added, by table. The list is complete: later revisions are in our version table.
_MARKS: Final[dict[str, dict[str, str]]] = {
    "0001": {
        "evaluations": "eval_id status attempt version code_event_id result_event_id",
        "evaluation_events": "eval_id event_id type attempt occurred_at recorded_at extra",
        "contents": "eval_id event_id kind size sha256 data",
        "confirmations": "id recorded_at count body relayed_at stream_ms stream_seq",
        "confirmation_position": "id stream_ms stream_seq",
    },
    "0002": {"dead_letters": "id queue eval_id event_id message error_class signature deliveries", "probes": "name at"},
    "0003": {"redrives": "id asked_at actor filter canary returned", "operator_actions": "id at actor verb filter redrive"},
    "0004": {"api_keys": "key_id name digest scopes revoked_at"},
    "0005": {"contents": "store encoding failures failure retry_at"},
    "0006": {"contents": "occurred_at", "dead_letters": "objects"},
    "0007": {"content_grants": "key_id sha256 size encoding granted_at"},
    "0008": {"confirmations": "traceparents"},
}
_COLUMNS: Final = """
SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    AND c.relkind IN ('r', 'p') AND c.relname = ANY(%s)
"""


def recognised(conn: Connection) -> str | None:
    """Return the revision that our tables in the current schema show, up to 0008. Return None if the tables are not ours."""
    tables = sorted({table for marks in _MARKS.values() for table in marks})
    columns_present = set(database.driver(conn).execute(_COLUMNS, [tables]).fetchall())
    last = None
    for revision, marks in _MARKS.items():
        if not columns_present.issuperset((table, column) for table, columns in marks.items() for column in columns.split()):
            break
        last = revision
    return last


_SHARED_EXISTS: Final = "SELECT to_regclass(quote_ident(current_schema()) || '.alembic_version') IS NOT NULL"
_SHARED_ROW: Final = "SELECT 1 FROM alembic_version WHERE version_num = %s"


def is_in_shared_table(conn: Connection, revision: str) -> bool:
    """Tell whether `alembic_version` in the current schema holds this revision. It may hold others too."""
    with database.driver(conn).cursor() as cursor:
        ((exists,),) = cursor.execute(_SHARED_EXISTS).fetchall()
        return bool(exists) and cursor.execute(_SHARED_ROW, [revision]).fetchone() is not None
