"""Passing events on to other systems. A sink of your own needs what this module offers, and `models.errors`."""

from evalstore.sinks.options import Options
from evalstore.sinks.protocol import Batch, KeepsCursor, RepeatsBatches, Sink, SinkEvent, TakesConfirmations
from models.errors import BadMessage, Outage

__all__ = [
    "BadMessage",
    "Batch",
    "KeepsCursor",
    "Options",
    "Outage",
    "RepeatsBatches",
    "Sink",
    "SinkEvent",
    "TakesConfirmations",
]
