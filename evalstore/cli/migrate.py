"""`evalstore migrate`: migrate the database's tables."""

from evalstore.cli.output import notice
from evalstore.storage import database, durability, migrations
from models.metadata_keys import parse_keys
from models.settings import settings


def migrate() -> None:
    """Migrate the database to this release. Safe while workers run, and from several processes at once."""
    loaded = settings()
    url, schema = loaded.database_url.get_secret_value(), loaded.database_schema
    before, after = migrations.upgrade(
        url, lambda why: notice(why, "yellow"), schema=schema, indexed_metadata=parse_keys(loaded.indexed_metadata)
    )
    engine = database.connect(loaded)
    with engine.connect() as conn:
        for doubt in durability.doubts(conn):
            notice(f"PostgreSQL is not set up to keep what it commits: {doubt}", "yellow")
    engine.dispose()
    if before == after:
        notice(f"the schema is already at {after}")
    else:
        notice(f"the schema was migrated from {before or 'nothing'} to {after}", "green")
