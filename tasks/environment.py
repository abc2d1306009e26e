"""What a process does about its settings when it starts."""

import logging
import os
import sys
from functools import cache

from models.errors import InvalidSettings
from models.settings import Settings, misspelt, settings

log = logging.getLogger("evalstore.settings")


def settings_or_end() -> Settings:
    """This process's settings. Where they are wrong, say what is to be mended, without the traceback that would bury it, and
    end the process with status 2."""
    try:
        return settings()
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        sys.exit(2)


@cache
def tell_misspelt() -> None:
    """Log, once in a process, which variables do nothing and are spelt like a setting: a sender whose `EVALSTORE_SPOOLDIR` is
    not read would learn of it in an outage."""
    for problem in misspelt(os.environ):
        log.warning("a variable of the environment does nothing: %s", problem)
