"""The HTTP service from Python. Needs httpx and `models` alone.

    with StorageClient("http://localhost:8086", key) as storage:
        storage.create_evaluation("run-1", code="print(1)")
        storage.update_evaluation("run-1", "completed", exit_code=0, output="1\\n")
        print(storage.get_evaluation("run-1").status)

Every write is repeatable: the same call is stored once. So the client retries whatever is not answered, at the next address
if there are several.
"""

import base64
import hashlib
import io
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, Self, cast
from urllib.parse import quote
from uuid import uuid4

import httpx

from evalstore.client.event_stream import parse
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
from models.errors import Fault, ObjectDamaged
from models.events import decode

Kind = Literal["code", "output", "error"]
_BATCH: Final = 5_000
_BATCH_BYTES: Final = 16 * 1024 * 1024
_PIECE_BYTES: Final = 256 * 1024
_LONGEST_WAIT_S: Final = 5.0
_LONGEST_POLL_S: Final = 30.0  # of one request that waits; proxies often end requests after a minute
_SILENCE_S: Final = 40.0  # of a stream, whose heartbeats come every 15 s
_UNFINISHED: Final = frozenset({"queued", "running"})


class StorageClient:
    """A connection pool to one service. Threads may share it.

    `url` may name several processes of the service: after a failure the next one is asked.

    Every call raises ServiceError for a refused request, and ServiceOutage if the service cannot be reached for `retry_s`
    seconds. `timeout_s` bounds each step of one attempt. Raises ValueError for an invalid address or key.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        key: str,
        *,
        timeout_s: float = 30.0,
        retry_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._urls = [each.strip().rstrip("/") for each in ([url] if isinstance(url, str) else url)]
        self._asked = 0  # the number of the address to ask, counted on at each failure
        self._timeout_s, key = timeout_s, key.strip()
        if not self._urls or not all(re.fullmatch(r"https?://[^/?#\s][^?#\s]*", each) for each in self._urls):
            raise ValueError("expected an address like http://host:8086 or https://host/path")
        if not re.fullmatch(r"[!-~]+", key, re.ASCII):
            raise ValueError("expected a key of printable ASCII without spaces")
        self._retry_s = retry_s
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def create_evaluation(self, eval_id: str, code: str | bytes | None = None, **fields: Any) -> Evaluation:
        """Create an evaluation. `fields`: `language`, `submitter`, `metadata`, … `code`, or `code_ref` from `put_content`.

        Raises Conflict if another event created it.
        """
        body = _body({"eval_id": eval_id, "code": code, "occurred_at": _now(), **fields})
        answer = self._request("POST", "/storage/evaluations", content=body, headers={"Idempotency-Key": uuid4().hex})
        return _evaluation(answer.content)

    def update_evaluation(self, eval_id: str, status: str, *, if_version: int | None = None, **fields: Any) -> Evaluation:
        """Store a new status: `running`, `completed`, `failed`, `timed_out` or `cancelled`, and the fields of that event.

        With `if_version`, raises VersionChanged unless the record is at that version.
        """
        headers = {} if if_version is None else {"If-Match": f'"{if_version}"'}
        if not fields.keys() & {"event_id", "occurred_at"}:
            headers["Idempotency-Key"] = uuid4().hex
        body = _body({"status": status, "occurred_at": _now(), **fields})
        return _evaluation(self._request("PUT", _path(eval_id), content=body, headers=headers).content)

    def get_evaluation(self, eval_id: str) -> Evaluation:
        """Return the current record. Raises NotFound."""
        return _evaluation(self._request("GET", _path(eval_id)).content)

    def wait(self, eval_id: str, *, timeout_s: float | None = None) -> Evaluation:
        """Return the record as soon as the evaluation is finished or lost. It may be created meanwhile.

        Raises TimeoutError if it is not finished after `timeout_s`, and NotFound if it does not even exist then.
        """
        give_up = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = min(_LONGEST_POLL_S, max(0.0, give_up - time.monotonic()))
            timeout = httpx.Timeout(self._timeout_s, read=left_s + self._timeout_s)
            missing: NotFound | None = None
            try:
                answer = self._request("GET", _path(eval_id), params={"wait": f"{left_s:.3f}"}, timeout=timeout)
                if (found := _evaluation(answer.content)).status not in _UNFINISHED:
                    return found
            except NotFound as error:
                missing = error
            if time.monotonic() >= give_up:
                raise missing or TimeoutError(f"evaluation {eval_id!r} is not finished after {timeout_s} s")

    def stream(
        self,
        *,
        eval_id: str | None = None,
        run_id: str | None = None,
        status: str | Iterable[str] | None = None,
        last_event_id: str | None = None,
    ) -> Iterator[Change]:
        """Yield changes as they are committed, without end. Resume a broken stream without a gap, also at another process.

        The stream begins with the first iteration, or after the change `last_event_id`. A change may come twice. Where the
        service does not have all changes after a pause any more, a Change of type `snapshot` comes: read the evaluations again.
        """
        query: dict[str, Any] = {"eval_id": eval_id, "run_id": run_id, "status": status}
        query = {name: value for name, value in query.items() if value is not None}
        timeout = httpx.Timeout(self._timeout_s, read=max(self._timeout_s, _SILENCE_S))
        while True:
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            answer = self._request("GET", "/storage/stream", stream=True, params=query, headers=headers, timeout=timeout)
            try:
                for message in parse(answer.iter_bytes()):
                    last_event_id = message.last_id or last_event_id
                    if message.data:
                        yield Change.model_validate({**decode(message.data.encode()), "event_id": last_event_id})
            except httpx.TransportError:
                pass
            finally:
                answer.close()
            self._ask_next()
            _pause(0.1)

    def list_evaluations(
        self,
        *,
        status: str | Iterable[str] | None = None,
        metadata: Mapping[str, str] | None = None,
        page_size: int = 500,
        **filters: Any,
    ) -> Iterator[Evaluation]:
        """Yield all matching records without content, newest first. Reads a page at a time while you iterate.

        `filters`: `run_id`, `language`, `submitter`, `executor_id`, `eval_id_prefix`, `since`, `until`, `sort`,
        `order="oldest"`.
        """
        query: dict[str, Any] = {"limit": page_size, "cursor": ""}
        query |= {name: _to_text(value) for name, value in filters.items() if value is not None}
        query |= {f"metadata.{name}": value for name, value in (metadata or {}).items()}
        if status is not None:
            query["status"] = [status] if isinstance(status, str) else list(status)
        while True:
            page = decode(self._request("GET", "/storage/evaluations", params=query).content)
            yield from map(Evaluation.model_validate, page["evaluations"])
            if page["next"] is None:
                return
            query["cursor"] = page["next"]

    def get_run(self, run_id: str) -> Run:
        """Return a run with the sums of its evaluations, which are late by some seconds. Raises NotFound."""
        return Run.model_validate(decode(self._request("GET", _run_path(run_id)).content))

    def list_runs(self, *, page_size: int = 100, **filters: Any) -> Iterator[Run]:
        """Yield all matching runs, the newest first. Reads a page at a time while you iterate.

        `filters`: `run_id_prefix`, `submitter`, `since`, `until`.
        """
        query: dict[str, Any] = {"limit": page_size, "cursor": ""}
        query |= {name: _to_text(value) for name, value in filters.items() if value is not None}
        while query["cursor"] is not None:
            page = decode(self._request("GET", "/storage/runs", params=query).content)
            yield from map(Run.model_validate, page["runs"])
            query["cursor"] = page["next"]

    def declare_run(self, run_id: str, *, expected: int | None = None, closed: bool | None = None) -> Run:
        """Declare how many evaluations a run has, or that it gets no more. It then finishes when none is unfinished."""
        body = _body({"expected": expected, "closed": closed})
        return Run.model_validate(decode(self._request("PUT", _run_path(run_id), content=body).content))

    def get_statistics(self, **query: Any) -> list[dict[str, Any]]:
        """Return rows of statistics of finished evaluations.

        `query`: `group_by` (`status`, `language`, `submitter`, `executor`, `run`), `value`, `bucket` (`hour`, `day`, `month`,
        `all`), `since`, `until`.
        """
        params = {name: _to_text(value) for name, value in query.items() if value is not None}
        rows: list[dict[str, Any]] = decode(self._request("GET", "/storage/stats", params=params).content)["rows"]
        return rows

    def put_content(self, content: bytes | BinaryIO) -> dict[str, Any]:
        """Upload content, and return its reference. Send it within days as an event's `output_ref`, `code_ref` or `error_ref`.

        A file is sent from its position to its end, in pieces. It must be seekable, because a failed attempt is repeated.
        Raises ObjectDamaged if the service received other bytes.
        """
        source: BinaryIO = io.BytesIO(content) if isinstance(content, bytes) else content
        start, hasher = source.tell(), hashlib.sha256()

        def build() -> httpx.Request:
            nonlocal hasher
            source.seek(start)
            hasher = hashlib.sha256()
            return self._build("POST", "/storage/content", content=_pieces(source, hasher))

        reference: dict[str, Any] = decode(self._send(build).content)
        if reference["sha256"] != hasher.hexdigest():
            raise ObjectDamaged("the service received other bytes than were sent")
        return reference

    def get_output(self, eval_id: str) -> bytes:
        """Return the whole standard output. Raises NotFound."""
        return self.get_content(eval_id, "output")

    def get_content(self, eval_id: str, kind: Kind) -> bytes:
        """Return a whole content. Raises NotFound."""
        return b"".join(self.stream_content(eval_id, kind))

    def stream_content(self, eval_id: str, kind: Kind = "output", *, start: int = 0) -> Iterator[bytes]:
        """Yield a content in pieces, from byte `start` on. Resume a broken stream at its position.

        Raises NotFound, and VersionChanged if the record's content changes during the read.
        """
        position, etag, give_up = start, "", time.monotonic() + self._retry_s
        wait_s = 0.05
        while True:
            headers = {"Accept-Encoding": "identity"}  # raw pieces are yielded: no proxy may compress them
            if position:
                headers["Range"] = f"bytes={position}-"
            if position and etag:  # other, shorter content would answer 416, which looks like the end
                headers["If-Range"] = etag.removeprefix("W/")
            try:
                with self._opened("GET", f"{_path(eval_id)}/{kind}", headers) as answer:
                    etag = _check_etag(etag, answer.headers["etag"])
                    for piece in answer.iter_raw():
                        position += len(piece)
                        give_up, wait_s = time.monotonic() + self._retry_s, 0.05
                        yield piece
                    return
            except httpx.TransportError as error:
                wait_s = _wait(wait_s, give_up, error)
            except ServiceError as error:
                if error.status == 416:
                    return
                raise

    @contextmanager
    def _opened(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        answer = self._request(method, path, headers=headers, stream=True)
        try:
            yield answer
        finally:
            answer.close()

    def send_events(self, events: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        """Store any number of events in transactions of up to 5,000, and yield the outcome of each in order.

        Fills in a missing `event_id` and `occurred_at`. Sends while you iterate.
        """
        lines: list[bytes] = []
        size = 0
        for event in events:
            line = _body({"event_id": str(uuid4()), "occurred_at": _now(), **event})
            if lines and (len(lines) == _BATCH or size + len(line) > _BATCH_BYTES):
                yield from self._send_lines(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        if lines:
            yield from self._send_lines(lines)

    def _send_lines(self, lines: list[bytes]) -> Iterator[Outcome]:
        headers = {"Content-Type": "application/x-ndjson"}
        answer = self._request("POST", "/storage/events:batch", content=b"\n".join(lines), headers=headers)
        for line in answer.content.splitlines():
            outcome = decode(line)
            outcome["faults"] = [Fault(**fault) for fault in outcome.get("faults", ())]
            yield Outcome.model_validate(outcome)

    def _request(self, method: str, path: str, *, stream: bool = False, **options: Any) -> httpx.Response:
        return self._send(lambda: self._build(method, path, **options), stream=stream)

    def _build(self, method: str, path: str, **options: Any) -> httpx.Request:
        return self._http.build_request(method, self._urls[self._asked % len(self._urls)] + path, **options)

    def _ask_next(self) -> None:
        """Ask the next address from now on. Threads that fail at once may skip one; the next failure comes back to it."""
        self._asked += 1

    def _send(self, build: Callable[[], httpx.Request], *, stream: bool = False) -> httpx.Response:
        """Send a request, built again for each attempt, until an answer is no outage."""
        give_up, wait_s = time.monotonic() + self._retry_s, 0.05
        while True:
            try:
                answer = self._http.send(build(), stream=stream)
            except httpx.TransportError as error:
                self._ask_next()
                wait_s = _wait(wait_s, give_up, error)
                continue
            if answer.is_success:
                return answer
            answer.read()
            refusal = _refusal(answer)
            if answer.status_code not in {408, 429, 502, 503, 504}:
                raise refusal
            if answer.status_code != 429:  # A rate is that of all processes.
                self._ask_next()
            wait_s = _wait(_asked_wait_s(answer, wait_s), give_up, refusal)


def _wait(wait_s: float, give_up: float, error: Exception) -> float:
    """Wait before the next attempt, and return the wait after it. Raises ServiceOutage after `give_up`."""
    if time.monotonic() + wait_s > give_up:
        raise ServiceOutage(str(error) or type(error).__name__) from error
    _pause(wait_s)
    return min(_LONGEST_WAIT_S, wait_s * 2)


def _pause(longest_s: float) -> None:
    time.sleep(longest_s * random.uniform(0.5, 1))  # noqa: S311 - spreads clients, needs no secrecy


def _asked_wait_s(answer: httpx.Response, wait_s: float) -> float:
    """Return the wait before the next attempt: at least that of Retry-After for a rate that is exceeded."""
    asked = answer.headers.get("retry-after", "")
    return max(wait_s, min(60.0, float(asked)) * 2) if answer.status_code == 429 and asked.isdigit() else wait_s


def _check_etag(before: str, etag: str) -> str:
    if before not in {"", etag}:
        raise VersionChanged(412, "changed", "the record has other content now: read it again")
    return etag


def _refusal(answer: httpx.Response) -> ServiceError:
    try:
        problem = answer.json()
        faults = [Fault(fault["field"], fault["problem"]) for fault in problem.get("faults", ())]
        kind, detail = str(problem["type"]).rpartition(":")[2], str(problem["detail"])
    except (ValueError, KeyError, TypeError, AttributeError):  # The answer is not from the service, but from a proxy.
        kind, detail, faults = "unknown", answer.text[:200], []
    kind_of_error = {404: NotFound, 409: Conflict, 412: VersionChanged}.get(answer.status_code, ServiceError)
    return kind_of_error(answer.status_code, kind, detail, faults, answer.headers.get("x-request-id"))


def _pieces(source: BinaryIO, hasher: Any) -> Iterator[bytes]:
    while piece := source.read(_PIECE_BYTES):
        hasher.update(piece)
        yield piece


def _path(eval_id: str) -> str:
    return f"/storage/evaluations/{quote(eval_id, safe=':@+=~')}"


def _run_path(run_id: str) -> str:
    return f"/storage/runs/{quote(run_id, safe=':@+=~')}"


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _to_text(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _body(fields: Mapping[str, Any]) -> bytes:
    sent: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, bytes):
            sent[f"{name}_b64"] = base64.b64encode(value).decode()
        elif value is not None:
            sent[name] = str(value) if name == "event_id" else _to_text(value)
    return json.dumps(sent, allow_nan=False).encode()


def _evaluation(body: bytes) -> Evaluation:
    fields = cast("dict[str, Any]", decode(body))
    for name in ("code", "output", "error"):
        if (b64 := fields.get(f"{name}_b64")) is not None:
            fields[name] = base64.b64decode(b64)
    return Evaluation.model_validate(fields)
