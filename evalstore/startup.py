"""What a process does about its settings when it starts."""

import logging
import os
import sys
from functools import cache

from models.errors import InvalidSettings
from models.settings import Settings, misspelt, settings

log = logging.getLogger("evalstore.settings")


def settings_or_end() -> Settings:
    """The settings of a process that speaks to the database. Where they are wrong, say what is to be mended, without the
    traceback that would bury it, and end the process with status 2: a worker would find each event at fault."""
    from evalstore.storage import database

    try:
        read = settings()
        database.parse(read.database_url.get_secret_value())
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    return read


@cache
def tell_misspelt() -> None:
    """Log, once in a process, which variables do nothing and are spelt like a setting: a sender whose `EVALSTORE_SPOOLDIR` is
    not read would learn of it in an outage."""
    for problem in misspelt(os.environ):
        log.warning("a variable of the environment does nothing: %s", problem)
