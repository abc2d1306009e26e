"""`evalstore migrate`: the database's tables."""

from evalstore.cli.output import notice
from evalstore.storage import database, durability, migrations
from models.settings import settings


def migrate() -> None:
    """Bring the database's tables to this release. Safe while workers run, and from several places at once."""
    url, schema = settings().database_url.get_secret_value(), settings().database_schema
    before, after = migrations.upgrade(url, tell=lambda why: notice(why, "yellow"), schema=schema)
    engine = database.connect(settings())
    with engine.connect() as conn:
        for doubt in durability.doubts(conn):
            notice(f"PostgreSQL is not set up to keep what it commits: {doubt}", "yellow")
    engine.dispose()
    if before == after:
        notice(f"the schema is at {after} already")
    else:
        notice(f"the schema went from {before or 'nothing'} to {after}", "green")
