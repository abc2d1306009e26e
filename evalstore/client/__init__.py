"""The HTTP service's client: `StorageClient`, its results and its errors."""

from evalstore.client.http import StorageClient
from evalstore.client.responses import (
    Change,
    Conflict,
    Evaluation,
    NotFound,
    Outcome,
    Run,
    ServiceError,
    ServiceOutage,
    VersionChanged,
)

__all__ = [
    "Change",
    "Conflict",
    "Evaluation",
    "NotFound",
    "Outcome",
    "Run",
    "ServiceError",
    "ServiceOutage",
    "StorageClient",
    "VersionChanged",
]
