"""A Dramatiq middleware that records actors as evaluations. The broker may be any: the events go to evalstore's own Redis.

broker.add_middleware(RecordEvaluations())

@dramatiq.actor(evaluation={"language": "python"}, time_limit=60_000)
def grade(code): ...

grade.send_with_options(args=(code,), eval_id="run-1:7", evaluation={"run_id": "run-1", "code": code})
"""

import socket
from datetime import UTC, datetime
from typing import Any

from dramatiq import Broker
from dramatiq.broker import MessageProxy
from dramatiq.middleware import Middleware, TimeLimit

from tasks.endings import Json
from tasks.recording import Recording, recording


class RecordEvaluations(Middleware):
    """Record each execution of an actor that has the option `evaluation`, or of a message that has it.

    The option is True, or a dictionary of arguments of `recording`; those of the message win. The evaluation is named by the
    message's option `eval_id`, else by its message_id. A retry is the next attempt. The actor sets its result on
    `tasks.recording.current_recording()`. An error is failed, with its traceback. The time limit is timed_out. An abort, a
    shutdown and a skipped message are cancelled.

    A failed send never fails the actor: Dramatiq logs it. Set EVALSTORE_SPOOL_DIR, so that an outage of Redis loses no ending.
    Add it after middleware that skips messages, so that these do not start.
    """

    def __init__(self, *, executor_id: str | None = None) -> None:
        """`executor_id` names this worker in the events; the host's name if it is None."""
        self.executor_id = socket.gethostname() if executor_id is None else executor_id
        self._runs: dict[int, Recording] = {}

    @property
    def actor_options(self) -> set[str]:
        return {"evaluation"}

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        run = None if message.failed else self._run(broker, message)
        if run is not None:
            self._runs[id(message)] = run
            run.enter()
            run.start()

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,  # noqa: ARG002 - Dramatiq's signature
        exception: BaseException | None = None,
    ) -> None:
        if message.failed and exception is None:  # another middleware refused the message, and the actor did not run
            self._cancel(broker, message, "the message was rejected before it ran")
        elif (run := self._runs.pop(id(message), None)) is not None:
            try:
                run.finish(exception)
            finally:
                run.leave()

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        self._cancel(broker, message, "the message was skipped")

    def _cancel(self, broker: Broker, message: MessageProxy, reason: str) -> None:
        started = self._runs.pop(id(message), None)
        run = started or self._run(broker, message)
        if run is not None:
            run.status, run.reason = "cancelled", reason
            try:
                run.finish()
            finally:
                if started is not None:
                    run.leave()

    def _run(self, broker: Broker, message: MessageProxy) -> Recording | None:
        """Return the recording of a message, or None if it is not to be recorded."""
        actor = broker.get_actor(message.actor_name)
        own, of_actor = message.options.get("evaluation"), actor.options.get("evaluation")
        if own is False or not (own or of_actor or "eval_id" in message.options):
            return None
        fields: Json = {"executor_id": self.executor_id}
        for given in (of_actor, own):
            fields |= given if isinstance(given, dict) else {}
        eval_id = message.options.get("eval_id") or fields.pop("eval_id", None) or message.message_id
        limit_ms = message.options.get("time_limit") or actor.options.get("time_limit", _default_limit_ms(broker))
        if limit_ms is not None and limit_ms != float("inf"):
            fields.setdefault("timeout_s", limit_ms / 1000)
        fields.setdefault("attempt", message.options.get("retries", 0) + 1)
        return recording(eval_id, queued_at=datetime.fromtimestamp(message.message_timestamp / 1000, UTC), **fields)


def _default_limit_ms(broker: Broker) -> float | None:
    return next((each.time_limit for each in broker.middleware if isinstance(each, TimeLimit)), None)
