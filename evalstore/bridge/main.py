"""`evalstore bridge`: settings, signals, metrics and health around the listener."""

import signal
import sys

from evalstore.bridge import mapping
from evalstore.bridge.listener import Bridge, connect
from evalstore.telemetry import exposition, log_setup
from evalstore.telemetry.counters import Counters, Schema, counted_by
from evalstore.telemetry.exposition import Answer
from models.errors import InvalidSettings
from models.logs import EventLogger
from models.settings import settings
from tasks.broker import broker

log = EventLogger("evalstore.bridge")


def main() -> int:
    """Run until SIGTERM or SIGINT. Return the exit status: 4 if something was heard and could not be sent.

    Raises InvalidSettings.
    """
    loaded = settings()
    mapped = mapping.load(loaded.bridge_file)
    try:
        source = connect(mapped.source_url(loaded.redis_url.get_secret_value()))
    except ValueError as error:
        raise InvalidSettings(f"EVALSTORE_BRIDGE_FILE: the source is no address of a Redis: {error}") from None
    log_setup.set_up()
    broker()  # so that wrong settings end the start
    counters = Counters(Schema(counted_by("bridge"), {}))
    bridge = Bridge(mapped, source, counters)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: bridge.stop())

    def ready() -> Answer:
        connected = bool(counters.get("evalstore_bridge_connected"))
        return (
            Answer(200, {"status": "ready"}) if connected else Answer(503, {"status": "not ready", "source": "not subscribed"})
        )

    exposition.publish("bridge", counters, loaded, loaded.bridge_metrics_port, log, ready)
    if left := bridge.run():
        log.error("bridge_left", messages=left)
    sys.stdout.flush()
    return 4 if left else 0
