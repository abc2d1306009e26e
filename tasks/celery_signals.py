"""Record the tasks of a Celery application as evaluations.

record_evaluations(app)

@app.task(evaluation={"language": "python"}, time_limit=60)
def grade(code): ...

grade.apply_async((code,), headers={"evaluation": {"eval_id": "run-1:7", "run_id": "run-1", "code": code}})
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from models.errors import InvalidEvent, Outage
from models.logs import EventLogger
from tasks.endings import Json
from tasks.recording import Recording, recording

if TYPE_CHECKING:
    from celery import Celery

log = EventLogger("evalstore")


def record_evaluations(app: "Celery", *, executor_id: str | None = None) -> None:
    """Record each execution of a task that has the attribute `evaluation`, or whose message has the header `evaluation`.

    Call it where the worker's process imports the application. The value is True, or a dictionary of arguments of `recording`;
    those of the header win. The evaluation is named by `eval_id` in it, else by the task's id. A retry is the next attempt. The
    task sets its result on `tasks.recording.current_recording()`. An error and a retry are failed, with the traceback. Both
    time limits are timed_out. Revoked, expired, ignored and rejected tasks are cancelled. A killed process is failed.

    A failed send is logged and never fails the task. Set EVALSTORE_SPOOL_DIR, so that an outage of Redis loses no ending.
    `executor_id` names this worker in the events; the host's name if it is None. Raises ModuleNotFoundError without Celery.
    """
    recorder = _Recorder(app, socket.gethostname() if executor_id is None else executor_id)
    recorder.connect()


class _Recorder:
    """The receivers of Celery's signals. A child process runs a task; the main process sees revoked and killed ones."""

    def __init__(self, app: "Celery", executor_id: str) -> None:
        self.app, self.executor_id = app, executor_id
        self._runs: dict[str, Recording] = {}
        self._raised: dict[str, BaseException | None] = {}
        self._requests: WeakValueDictionary[str, Any] = WeakValueDictionary()

    def connect(self) -> None:
        from celery import signals

        for name in ("task_received", "task_prerun", "task_failure", "task_retry", "task_postrun", "task_revoked"):
            # Signals hold receivers weakly, unless weak=False. The uid keeps out a second recorder of an application.
            getattr(signals, name).connect(getattr(self, name), weak=False, dispatch_uid=("evalstore", name, id(self.app)))

    def task_received(self, request: Any, **_: Any) -> None:
        """Keep the request, in the main process: its failure signal lacks the attempt."""
        self._requests[request.id] = request

    def task_prerun(self, task_id: str, task: Any, **_: Any) -> None:
        """Start, in the process that runs the task."""
        if task.app is self.app and (run := self._run(task, task_id, vars(task.request))) is not None:
            self._runs[task_id] = run
            run.enter(handle_sigterm=False)  # the main process reports a terminated task
            with _logged(run):
                run.start()

    def task_failure(self, sender: Any, task_id: str, exception: BaseException, **_: Any) -> None:
        if task_id in self._runs:
            self._raised[task_id] = exception
        elif (request := self._requests.pop(task_id, None)) is not None:  # its process was killed
            self._end(sender, task_id, request.request_dict, exception)

    def task_retry(self, request: Any, reason: Any, **_: Any) -> None:
        if request.id in self._runs:
            self._raised[request.id] = reason.exc or reason

    def task_postrun(self, task_id: str, state: str | None, **_: Any) -> None:
        """End, in the process that ran the task."""
        if (run := self._runs.pop(task_id, None)) is not None:
            raised = self._raised.pop(task_id, None)
            run.leave()
            if state is None:  # this process is being killed, and the main process reports the task
                run.abandon()
                return
            if state in {"IGNORED", "REJECTED"}:
                run.status, run.reason = "cancelled", state.lower()
            with _logged(run):
                run.finish(raised)

    def task_revoked(self, sender: Any, request: Any, *, terminated: bool, expired: bool, **_: Any) -> None:
        self._requests.pop(request.id, None)
        reason = "expired" if expired else "terminated" if terminated else "revoked"
        self._end(sender, request.id, vars(request), None, reason)

    def _end(self, task: Any, task_id: str, request: Json, raised: BaseException | None, reason: str | None = None) -> None:
        """Send an ending for a task that runs in no process."""
        if task.app is self.app and (run := self._run(task, task_id, request)) is not None:
            if raised is None:
                run.status, run.reason = "cancelled", reason
            with _logged(run):
                run.finish(raised)

    def _run(self, task: Any, task_id: str, request: Json) -> Recording | None:
        """Return the recording of a task, or None if it is not to be recorded."""
        own = request.get("evaluation", (request.get("headers") or {}).get("evaluation"))
        of_task = getattr(task, "evaluation", None)
        if own is False or not (own or of_task):
            return None
        fields: Json = {"executor_id": self.executor_id, "attempt": (request.get("retries") or 0) + 1}
        limits = [limit for limit in (request.get("timelimit") or ()) if limit]
        limits += [limit for limit in (task.soft_time_limit, task.time_limit) if limit]
        if limits:
            fields["timeout_s"] = min(limits)
        for given in (of_task, own):
            fields |= given if isinstance(given, dict) else {}
        return recording(fields.pop("eval_id", task_id), **fields)


@contextmanager
def _logged(run: Recording) -> Iterator[None]:
    """Log an error of a send instead of raising it: a task must not fail because of its recording."""
    try:
        yield
    except Outage:
        pass  # logged by the run
    except InvalidEvent as error:
        log.error("recording_invalid", eval_id=run.eval_id, error=error)  # noqa: TRY400
