"""Check the settings of a process that uses the database, before it starts its work."""

import contextlib
import sys

from evalstore.storage import database
from models.addresses import parse_redis_url
from models.errors import DatabaseMisconfigured, DatabaseOutage, InvalidSettings
from models.extras import require
from models.settings import Settings, settings
from tasks import tracing


def load_or_exit() -> Settings:
    """Return this process's settings, or print each fault to stderr and exit with status 2.

    A worker with wrong settings would turn each event into a dead letter. Tracing without the extra `otel` is a fault too.
    """
    if tracing.is_asked_for():
        require("otel")
    try:
        loaded = settings()
        with contextlib.suppress(DatabaseOutage):
            _check_access(loaded)
        _check_redis(loaded)
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    return loaded


def _check_access(loaded: Settings) -> None:
    try:
        database.check_access(loaded.database_url.get_secret_value())
    except DatabaseMisconfigured as error:
        raise InvalidSettings(f"EVALSTORE_DATABASE_URL: {error}") from None


def _check_redis(loaded: Settings) -> None:
    url = loaded.redis_url.get_secret_value()
    if parse_redis_url(url).kind != "server":
        from tasks import failover  # noqa: PLC0415 - it imports redis, and a plain server needs none of it

        try:
            failover.check(url, loaded.redis_namespace)
        except failover.Misaddressed as error:
            raise InvalidSettings(f"EVALSTORE_REDIS_URL: {error}") from None
