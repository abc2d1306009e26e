"""Record the execution of an evaluation: one started event, then exactly one ending.

with recording("run-1:7", executor_id="executor-1", timeout_s=10) as run:
    done = subprocess.run(["python3", "program.py"], capture_output=True, timeout=10)
    run.output, run.error, run.exit_code = done.stdout, done.stderr, done.returncode
"""

import asyncio
import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import cache, partial
from types import TracebackType
from typing import Any, Self, get_args

from models.errors import InvalidEvent, Outage
from models.logs import EventLogger
from models.record import rfc3339
from tasks.actor import store_evaluations
from tasks.child_memory import SAMPLER, Watch
from tasks.endings import Json, Status, as_reason, content_fields, event, joined, status_of
from tasks.termination import TERMINATION

log = EventLogger("evalstore")

_current: ContextVar["Recording | None"] = ContextVar("evalstore_run", default=None)
_active: set["Recording"] = set()


def current_recording() -> "Recording | None":
    """Return the innermost recording of the calling code, or None. A task or actor sets its result there."""
    return _current.get()


class Recording:
    """One execution of an evaluation. Set the result's attributes before the block ends.

    - `output`, `error`: text, or bytes, which come back exactly.
    - `exit_code`: 0 if unset and the status is completed.
    - `score`: the number that a grader gave. `metadata`: more keys for the record.
    - `memory_bytes`: if unset, the largest peak of one program that the block's thread started.
    - `duration_ms`: if unset, the time between start and end.
    - `status`: `completed`, unless the block raises or sets another. `reason`: why the execution was cancelled.
    - `unsent`: events that an outage kept back. Send them with `store_evaluations`.
    """

    output: str | bytes | None = None
    error: str | bytes | None = None
    exit_code: int | None = None
    score: float | None = None
    container_id: str | None = None
    memory_bytes: int | None = None
    duration_ms: float | None = None
    reason: str | None = None

    def __init__(self, eval_id: str, attempt: int, queued: Json, started: Json) -> None:
        """Use `recording`. `queued` and `started` are the fields of these events; an empty `queued` sends none."""
        self.eval_id, self.attempt = eval_id, attempt
        self.metadata: Json = {}
        self.unsent: list[Json] = []
        self._queued, self._started = queued, started
        self._status: Status | None = None
        self._started_at: float | None = None
        self._watch: Watch | None = None
        self._process_id = os.getpid()
        self._ended = threading.Lock()
        self._ending: Json | None = None
        self._has_handler = False
        self._outer: Recording | None = None

    @property
    def status(self) -> Status | None:
        """The ending that the block chose. None: it depends on how the block ends."""
        return self._status

    @status.setter
    def status(self, status: Status | None) -> None:
        if status is not None and status not in get_args(Status):
            raise ValueError(f"expected a status of {', '.join(get_args(Status))}, not {status!r}")
        self._status = status

    def start(self) -> None:
        """Send the queued event, if there is one, and the started event. `recording` calls this.

        During an outage both are kept, and sent with the ending. Raises InvalidEvent: nothing was sent.
        """
        events = [self._event("queued", **self._queued)] if self._queued else []
        events.append(self._event("started", **self._started))
        _end_all_at_exit()
        try:
            store_evaluations(events)
        except Outage as error:
            self.unsent = events
            log.warning("recording_delayed", eval_id=self.eval_id, error=error)
        except InvalidEvent:
            self._ended.acquire(blocking=False)
            raise
        except BaseException as error:
            self.finish(error)
            raise
        _active.add(self)
        self._started_at = time.monotonic()  # after the send, which may have waited for Redis

    def finish(self, raised: BaseException | None = None) -> None:
        """Send the ending, once, and nothing in a forked child. `raised` ended the execution. `recording` calls this.

        Raises Outage: `unsent` holds the events; send them again. Raises InvalidEvent for an invalid attribute: a failed event
        that names it is sent instead.
        """
        if self._process_id != os.getpid() or not self._ended.acquire(blocking=False):
            return
        try:
            self._send_ending(raised)
        except (InvalidEvent, Outage):
            raise
        except BaseException:  # a signal's handler or a time limit interrupted the send: repeat it, each event is stored once
            self._send_ending(raised)
            raise
        finally:
            _active.discard(self)

    def abandon(self) -> None:
        """Send no ending: another process reports it."""
        self._ended.acquire(blocking=False)
        _active.discard(self)

    def _send_ending(self, raised: BaseException | None) -> None:
        self._ending = ending = self._ending or self._build_ending(raised)
        try:
            self._send(ending)
        except InvalidEvent as error:
            kept = ("event_id", "occurred_at", "executor_id", "duration_ms")
            fields = {name: ending[name] for name in kept if ending.get(name) is not None}
            self._send(self._event("failed", **fields, error=f"evalstore cannot store this result: {error}"))
            raise

    def _send(self, ending: Json) -> None:
        """Send the ending behind the events that wait."""
        events = [*self.unsent, ending]
        try:
            store_evaluations(events)
        except Outage as error:
            self.unsent = events
            log.error("recording_unsent", events=len(events), eval_id=self.eval_id, error=error)  # noqa: TRY400
            raise
        self.unsent = []

    def _event(self, type_: str, **fields: Any) -> Json:
        return event(type_, self.eval_id, self.attempt, **fields)

    def _build_ending(self, raised: BaseException | None) -> Json:
        """Build the ending from the attributes and from the error that left the block."""
        memory_bytes = SAMPLER.stop(self._watch) if self._watch else None
        self.memory_bytes = memory_bytes if self.memory_bytes is None else self.memory_bytes
        if self._started_at is not None and self.duration_ms is None:
            self.duration_ms = (time.monotonic() - self._started_at) * 1000
        status, reason, error = self.status or "completed", self.reason, self.error
        if raised is not None:
            status = status_of(raised)
            self._take_result(raised)
            reason = reason or f"{type(raised).__name__}: {raised}".removesuffix(": ")
            error = joined(self.error, "".join(traceback.format_exception(raised))) if status == "failed" else self.error
        fields: Json = {"metadata": self.metadata or None}
        if status == "cancelled":
            return self._event(status, **fields, reason=None if reason is None else as_reason(reason))
        if status == "completed" and self.exit_code is None:
            self.exit_code = 0
        names = ("exit_code", "duration_ms", "memory_bytes", "container_id")
        fields |= {name: getattr(self, name) for name in names} | {"executor_id": self._started.get("executor_id")}
        fields["container_id"] = fields["container_id"] or self._started.get("container_id")
        if status == "completed":
            fields["score"] = self.score
        fields |= content_fields("output", self.output) | content_fields(
            "error", "" if status == "failed" and error is None else error
        )
        return self._event(status, **fields)

    def _take_result(self, raised: BaseException) -> None:
        """Take output and exit code from an error of `subprocess`, unless the block has set them."""
        subprocess = sys.modules.get("subprocess")
        if subprocess is None or not isinstance(raised, subprocess.SubprocessError):
            return
        for name, source in (("output", "output"), ("error", "stderr"), ("exit_code", "returncode")):
            if getattr(self, name) is None:
                setattr(self, name, getattr(raised, source, None))

    def enter(self, *, handle_sigterm: bool = True) -> None:
        """Make this the current run, watch the programs of this thread, and let SIGTERM end the block."""
        self._outer = _current.get()
        _current.set(self)
        self._watch = SAMPLER.start()
        self._has_handler = handle_sigterm and TERMINATION.enter()

    def leave(self) -> None:
        """Undo `enter`."""
        _current.set(self._outer)
        if self._has_handler:
            self._has_handler = False
            TERMINATION.leave()

    def __enter__(self) -> Self:
        self.enter()
        try:
            self.start()
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, raised: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            _finish(self, raised)
        finally:
            self.leave()

    async def __aenter__(self) -> Self:
        self.enter()
        try:
            await _in_thread(self.start)
        except BaseException as error:
            await _in_thread(partial(_finish, self, error))
            self.leave()
            raise
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, raised: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            await _in_thread(partial(_finish, self, raised))
        finally:
            self.leave()


def recording(  # noqa: PLR0913 - the fields of two events, by name
    eval_id: str,
    *,
    attempt: int = 1,
    executor_id: str | None = None,
    container_id: str | None = None,
    timeout_s: float | None = None,
    code: str | bytes | None = None,
    language: str | None = None,
    submitter: str | None = None,
    run_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    queued_at: datetime | None = None,
) -> Recording:
    """Record a block of code as one execution of an evaluation: `with recording(…) as run`, or `async with`.

    Sends a queued event if there is `code`, then a started event, and at the end of the block exactly one ending:

    - completed, or `run.status`, if the block raises nothing.
    - timed_out for a TimeoutError, and for the time limits of subprocess, Dramatiq and Celery.
    - failed for another Exception, with its traceback as `error`.
    - cancelled for all else: asyncio's CancelledError, KeyboardInterrupt, SystemExit. In the main thread, SIGTERM raises
      SystemExit(143), unless the application handles it.

    The block's error is raised again. `timeout_s` is stored; it stops nothing. `queued_at` is the time of the queued event,
    by default now. Each end blocks for up to EVALSTORE_SEND_TIMEOUT_S; `async with` sends in a thread.

    During an outage of Redis the block runs. With EVALSTORE_SPOOL_DIR its events wait on disk. Without, the exit raises Outage
    if the block raised nothing: send `run.unsent` again. Raises InvalidEvent for an invalid argument, before the block. Raises
    TypeError for a field of the queued event without `code`.
    """
    queued: Json = {"language": language, "submitter": submitter, "run_id": run_id}
    if code is not None:
        queued |= {**content_fields("code", code), "metadata": None if metadata is None else dict(metadata)}
        queued["occurred_at"] = None if queued_at is None else rfc3339(queued_at)
    elif extra := [name for name, value in queued.items() if value is not None]:
        raise TypeError(f"{', '.join(extra)}: a queued event holds this, and needs code; give code='' if there is none")
    else:
        queued = {}
    started: Json = {"executor_id": executor_id, "container_id": container_id, "timeout_s": timeout_s}
    if not queued and metadata is not None:
        started["metadata"] = dict(metadata)
    return Recording(eval_id, attempt, queued, started)


def _finish(run: Recording, raised: BaseException | None) -> None:
    """End a run. The block's error comes before an error of the send."""
    try:
        run.finish(raised)
    except (Outage, InvalidEvent) as error:
        if raised is None:
            error.add_note(f"of the recording of evaluation {run.eval_id}, attempt {run.attempt}")
            raise
        raised.add_note(f"evalstore did not store the result of evaluation {run.eval_id}: {error}")


async def _in_thread(work: Callable[[], None]) -> None:
    """Wait for `work` in a thread, also if the task is cancelled meanwhile; then raise the cancellation."""
    cancelled: asyncio.CancelledError | None = None
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)  # a future, which the loop's end does not cancel
    except RuntimeError:  # the interpreter ends
        work()
        return
    while not done.done():
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:
            if not done.done():
                raise
    done.result()
    if cancelled is not None:
        raise cancelled


@cache
def _end_all_at_exit() -> None:
    """Register the exit function, once. It ends the recordings of daemon threads and of suspended generators."""
    atexit.register(_end_all)


def _end_all() -> None:
    for run in list(_active):
        run.reason = run.reason or "the process ended"
        run.status = "cancelled"
        try:
            run.finish()
        except (Outage, InvalidEvent):
            continue  # finish has logged it


os.register_at_fork(after_in_child=_active.clear)
