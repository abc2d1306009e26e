"""`evalstore bridge`: settings, signals, metrics and health around the listener."""

import signal
import sys

from evalstore.bridge import mapping
from evalstore.bridge.listener import Bridge, connect
from evalstore.telemetry import exposition, log_setup, process_registry
from evalstore.telemetry.counters import Counters, Schema, counted_by
from evalstore.telemetry.exposition import Answer
from models.errors import InvalidSettings
from models.logs import EventLogger
from models.settings import Settings, settings
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
    schema = Schema(counted_by("bridge"), {})
    counters = Counters(schema)
    bridge = Bridge(mapped, source, counters)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: bridge.stop())
    _serve_metrics(loaded, counters, schema)
    if left := bridge.run():
        log.error("bridge_left", messages=left)
    sys.stdout.flush()
    return 4 if left else 0


def _serve_metrics(loaded: Settings, counters: Counters, schema: Schema) -> None:
    def ready() -> Answer:
        connected = bool(counters.get("evalstore_bridge_connected"))
        return (
            Answer(200, {"status": "ready"}) if connected else Answer(503, {"status": "not ready", "source": "not subscribed"})
        )

    try:
        group = process_registry.join("bridge", counters, loaded.runtime_dir)
    except process_registry.RegistryUnavailable as error:
        log.warning("runtime_dir_unusable", error=error)
    else:
        if loaded.bridge_metrics_port:
            exposition.start("bridge", group, schema, loaded, loaded.bridge_metrics_port, ready)
