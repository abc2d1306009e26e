"""Find variables that look like misspelt settings."""

import os
import re
from collections.abc import Mapping
from functools import cache

from models.logs import EventLogger
from models.settings import PREFIX, Settings
from models.validation_errors import did_you_mean

log = EventLogger("evalstore.settings")

# Variables that single commands read. They are no settings of a process.
_COMMAND_VARIABLES = {"EVALSTORE_API_URL", "EVALSTORE_ACTOR", "EVALSTORE_WEBHOOK_SECRET"}
# Kubernetes sets these variables for a service whose name begins with evalstore.
_SERVICE_LINK = re.compile(r".*_SERVICE_(HOST|PORT(_\w+)?)|.*_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?")


def unknown_settings(environment: Mapping[str, str]) -> list[str]:
    """Describe each variable that looks like a misspelt setting.

    These are no errors: a platform may have its own variables, and an older release may run with a newer one's settings.
    """
    known = [name.upper() for name in Settings.model_fields]
    problems = []
    for name in sorted(environment):
        prefix, rest = name[: len(PREFIX)], name[len(PREFIX) :].upper()
        is_setting = prefix == PREFIX and rest in known
        if prefix.upper() == PREFIX and not is_setting and name not in _COMMAND_VARIABLES and not _SERVICE_LINK.fullmatch(rest):
            hint = did_you_mean(rest, known, prefix=PREFIX)
            problems += [f"{name} is no setting{hint}"] if hint else []
    return problems


@cache
def warn_unknown_env() -> None:
    """Log each variable that looks like a misspelt setting, once in a process.

    Without this, a sender with `EVALSTORE_SPOOLDIR` would lose events in the first outage.
    """
    for problem in unknown_settings(os.environ):
        log.warning("unknown_setting", problem=problem)
