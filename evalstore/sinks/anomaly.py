"""Anomalies: failure rate, duration, memory, output size and rate of arrival that are unusual for their group.

river, and the modules that use it, are imported when a sink is made: only the runner needs them.
"""

from typing import TYPE_CHECKING

from evalstore.sinks.anomaly_options import AnomalyOptions
from evalstore.storage import database
from models.settings import Settings

if TYPE_CHECKING:
    from evalstore.sinks.anomaly_sink import AnomalySink


def create(name: str, options: AnomalyOptions, settings: Settings) -> "AnomalySink":
    """Return the sink, with a connection of its own to the database."""
    from evalstore.sinks.anomaly_sink import AnomalySink  # noqa: PLC0415 - see above

    return AnomalySink(name, options, database.connect(settings, pool_size=1))
