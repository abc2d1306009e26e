"""The processes of evalstore that are connected to the database, and their releases."""

from typing import Final

from sqlalchemy import Connection

from evalstore.storage import database

# A pooler hands the name of its client on.
_OTHERS: Final = """
SELECT DISTINCT application_name, coalesce(host(client_addr), 'local') FROM pg_stat_activity
WHERE datname = current_database() AND split_part(application_name, ' ', 1) = %s
    AND split_part(application_name, ' ', 2) COLLATE "C" < %s ORDER BY 1, 2
"""


def older(conn: Connection, revision: str) -> list[str]:
    """Return the hosts of connected processes whose release does not know this revision of the tables.

    A connection tells the newest revision that its release knows; of releases up to 0.2.0 it tells none. A process without an
    open connection is not seen. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return [f"{host} ({name})" for name, host in cursor.execute(_OTHERS, [database.CLIENT, revision])]
