"""The revisions of the tables that this release knows."""

from functools import cache
from pathlib import Path

from models.errors import SchemaMismatch


@cache
def revisions() -> tuple[str, ...]:
    """Return the revisions of this release in order, read from file names. Loading Alembic would be slow."""
    names = sorted(path.name.partition("_")[0] for path in Path(__file__).parent.glob("migrations/versions/*_*.py"))
    if not names:
        raise SchemaMismatch("this installation of evalstore holds no migrations: reinstall it")
    return tuple(names)
