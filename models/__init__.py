"""The data that crosses a process border. No I/O, and no imports beyond a gateway's packages."""

from models.errors import (
    BadMessage,
    EvalstoreError,
    EventIdReused,
    Fault,
    InvalidEvent,
    InvalidSettings,
    Outage,
    RedisOutage,
    SendRefused,
)
from models.events import (
    EvaluationCancelled,
    EvaluationCompleted,
    EvaluationFailed,
    EvaluationLost,
    EvaluationQueued,
    EvaluationStarted,
    EvaluationTimedOut,
    Event,
)
from models.fold import merge
from models.record import Record

__all__ = [
    "BadMessage",
    "EvalstoreError",
    "EvaluationCancelled",
    "EvaluationCompleted",
    "EvaluationFailed",
    "EvaluationLost",
    "EvaluationQueued",
    "EvaluationStarted",
    "EvaluationTimedOut",
    "Event",
    "EventIdReused",
    "Fault",
    "InvalidEvent",
    "InvalidSettings",
    "Outage",
    "Record",
    "RedisOutage",
    "SendRefused",
    "merge",
]
