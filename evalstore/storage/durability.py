"""Check whether a PostgreSQL server's settings keep what it commits. worker/redis_config.py does this for Redis."""

from typing import Final

from sqlalchemy import Connection

from evalstore.storage import database

_LOSES: Final = (
    "fsync is off: when its machine fails, events that it committed are lost, or the whole database",
    "full_page_writes is off: when its machine fails, pages may be damaged, unless the file system prevents it",
)
# An operator may set this default to stop writers before a switch-over, so evalstore does not override it.
_REFUSES: Final = "default_transaction_read_only is on for this role, database or server: nothing is stored"
_READ: Final = """
SELECT current_setting('fsync'), current_setting('full_page_writes'), current_setting('default_transaction_read_only'),
    CASE WHEN NOT has_database_privilege(current_database(), 'TEMPORARY')
        THEN format('this role may not create temporary tables: large batches are not stored: '
            'GRANT TEMPORARY ON DATABASE %I TO %I', current_database(), current_user) END
"""


def doubts(conn: Connection) -> list[str]:
    """Return a sentence for each reason why this server may lose commits or refuse writes. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        ((*safe, read_only, lacks_temporary),) = database.driver(conn).execute(_READ).fetchall()
    unsafe = [sentence for sentence, setting in zip(_LOSES, safe, strict=True) if setting == "off"]
    refuses = [_REFUSES] if read_only == "on" else []
    return [*unsafe, *refuses, *([lacks_temporary] if lacks_temporary else [])]
