"""`evalstore migrate`: the database's tables."""

from evalstore.cli.output import notice
from evalstore.storage import migrations
from models.settings import settings


def migrate() -> None:
    """Bring the database's tables to this release. Safe while workers run, and from several places at once."""
    before, after = migrations.upgrade(settings().database_url.get_secret_value(), tell=lambda why: notice(why, "yellow"))
    if before == after:
        notice(f"the schema is at {after} already")
    else:
        notice(f"the schema went from {before or 'nothing'} to {after}", "green")
