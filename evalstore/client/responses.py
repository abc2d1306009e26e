"""What the client gives and raises."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from models.errors import EvalstoreError, Fault, Outage
from models.fields import Scalars


class ServiceError(EvalstoreError):
    """The service refused a request, and would again. `faults` names every wrong field."""

    def __init__(
        self, status: int, kind: str, detail: str, faults: Iterable[Fault] = (), request_id: str | None = None
    ) -> None:
        self.status, self.kind, self.detail, self.request_id = status, kind, detail, request_id
        self.faults = tuple(faults)
        super().__init__(f"{status} {kind}: {detail}" + (f" (request {request_id})" if request_id else ""))


class NotFound(ServiceError):
    """There is no such evaluation, or it has no such content."""


class Conflict(ServiceError):
    """Another event is stored in its place."""


class VersionChanged(ServiceError):
    """The record is not at the version that was asked for: read it again."""


class ServiceOutage(Outage):
    """The service cannot be reached, or what it needs cannot. Nothing that was not answered counts as stored."""


class _Head(BaseModel):
    eval_id: str
    status: str
    version: int
    attempt: int | None = None


class Evaluation(Scalars, _Head):
    """A record. Content is text, or bytes where it is no text; None where there is none, or more than 64 KiB: then `…_size`
    tells so, and `get_content` reads it. A key that may not read is told `eval_id`, `version` and `status` alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    metadata: dict[str, Any] = {}
    metadata_truncated: bool = False
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    code: Any = None
    output: Any = None
    error: Any = None
    code_size: int | None = None
    output_size: int | None = None
    error_size: int | None = None


class Outcome(BaseModel):
    """What became of an event: `applied`, `duplicate`, `reused` (its event_id is stored with another body) or `invalid`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    outcome: str
    eval_id: str | None = None
    event_id: str | None = None
    faults: list[Fault] = []
