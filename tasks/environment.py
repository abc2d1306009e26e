"""What a process does about its settings when it starts."""

import contextlib
import logging
import os
import sys
from functools import cache

from models.errors import DatabaseMisconfigured, DatabaseOutage, InvalidSettings
from models.settings import Settings, misspelt, settings

log = logging.getLogger("evalstore.settings")


def settings_or_end() -> Settings:
    """The settings of a process that speaks to the database. Where they are wrong, say what is to be mended, without the
    traceback that would bury it, and end the process with status 2: a worker would find each event at fault."""
    try:
        read = settings()
        with contextlib.suppress(DatabaseOutage):
            _check_access(read)
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    return read


def _check_access(read: Settings) -> None:
    from storage import database

    try:
        database.check_access(read.database_url.get_secret_value())
    except DatabaseMisconfigured as error:
        raise InvalidSettings(f"EVALSTORE_DATABASE_URL: {error}") from None


@cache
def tell_misspelt() -> None:
    """Log, once in a process, which variables do nothing and are spelt like a setting: a sender whose `EVALSTORE_SPOOLDIR` is
    not read would learn of it in an outage."""
    for problem in misspelt(os.environ):
        log.warning("a variable of the environment does nothing: %s", problem)
