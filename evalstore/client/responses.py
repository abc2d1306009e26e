"""The client's results and errors."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from models.errors import EvalstoreError, Fault, Outage
from models.fields import Scalars


class ServiceError(EvalstoreError):
    """The service refused a request. Do not send it again unchanged. `faults` names every wrong field."""

    def __init__(
        self, status: int, kind: str, detail: str, faults: Iterable[Fault] = (), request_id: str | None = None
    ) -> None:
        self.status, self.kind, self.detail, self.request_id = status, kind, detail, request_id
        self.faults = tuple(faults)
        super().__init__(f"{status} {kind}: {detail}" + (f" (request {request_id})" if request_id else ""))


class NotFound(ServiceError):
    """The evaluation does not exist, or has no such content."""


class Conflict(ServiceError):
    """Another event is stored under the same evaluation or id."""


class VersionChanged(ServiceError):
    """The record is not at the expected version: read it again."""


class ServiceOutage(Outage):
    """The service, or a server that it needs, cannot be reached. A write without an answer may or may not be stored."""


class _Head(BaseModel):
    eval_id: str
    status: str
    version: int
    attempt: int | None = None


class Evaluation(Scalars, _Head):
    """A record. Content is a str, or bytes if it is not text. It is None if it is absent or larger than 64 KiB: `…_size` tells
    which, and `get_content` reads it. A key without the scope read gets `eval_id`, `version` and `status` alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    metadata: dict[str, Any] = {}
    metadata_truncated: bool = False
    enrichment: dict[str, Any] | None = None
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


class Run(BaseModel):
    """A run with the sums of its evaluations. Quantiles (`p50`, `p95`, `p99`) are within 1 %.

    `pass_rate`: completed with exit code 0, divided by those that ended, cancelled ones left out.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    run_id: str
    state: str
    evaluations: int
    unfinished: int
    by_status: dict[str, int]
    pass_rate: float | None
    mean_score: float | None
    duration_ms: dict[str, float | None]
    memory_bytes: dict[str, float | None]
    expected: int | None
    closed: bool
    first_at: datetime
    last_at: datetime
    finished_at: datetime | None


class Change(BaseModel):
    """A committed change: `type` is that of the confirmation, or `snapshot`: changes before it may have been missed.

    `evaluations` of a snapshot is the state of the evaluation that the stream is of, if it is of one. `event_id` is the place
    to resume at.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    eval_id: str | None = None
    version: int | None = None
    status: str | None = None
    run_id: str | None = None
    evaluations: list[dict[str, Any]] | None = None
    event_id: str | None = None


class Outcome(BaseModel):
    """The outcome of an event: `applied`, `duplicate`, `reused` (its event_id is stored with another body) or `invalid`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    outcome: str
    eval_id: str | None = None
    event_id: str | None = None
    faults: list[Fault] = []
