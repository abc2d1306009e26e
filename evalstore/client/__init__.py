"""The HTTP service's client: `StorageClient`, its results and its errors."""

from evalstore.client.http import StorageClient
from evalstore.client.responses import Conflict, Evaluation, NotFound, Outcome, Run, ServiceError, ServiceOutage, VersionChanged

__all__ = [
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
