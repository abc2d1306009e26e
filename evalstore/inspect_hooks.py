"""Send each sample of an Inspect AI eval as an evaluation, where EVALSTORE_INSPECT is on.

Inspect finds `EvalstoreHooks` by its entry point: https://inspect.aisi.org.uk/extensions.html#sec-hooks
While the setting is off, this module loads neither `tasks` nor the settings.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

Json = dict[str, Any]

_PATIENCE_S: Final = 60.0
_RETRY_S: Final = 1.0
_TIME_LIMITS: Final = frozenset({"time", "working"})
_GRADES: Final = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
# Inspect records the cancellation of a sample as the repr of asyncio's or trio's error.
_CANCELLED: Final = ("CancelledError(", "Cancelled(")


def __getattr__(name: str) -> Any:
    if name != "EvalstoreHooks":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _hooks_class()


@cache
def _hooks_class() -> type:  # noqa: C901 - a class of short methods
    """Define and register the class that Inspect calls."""
    from inspect_ai.hooks import Hooks, hooks  # noqa: PLC0415 - the extra

    class EvalstoreHooks(Hooks):  # type: ignore[misc]
        """Inspect's hooks, which wait while a thread sends."""

        def __init__(self) -> None:
            self._samples = Samples()

        def enabled(self) -> bool:
            return is_on()

        async def on_task_start(self, data: Any) -> None:
            self._samples.tasks[data.eval_id] = {"task": data.spec.task, "model": data.spec.model}

        async def on_sample_init(self, data: Any) -> None:
            await _in_thread(partial(self._samples.queue, data))

        async def on_sample_attempt_start(self, data: Any) -> None:
            await _in_thread(partial(self._samples.start, data))

        async def on_sample_attempt_end(self, data: Any) -> None:
            if data.will_retry:
                await _in_thread(partial(self._samples.retry, data))

        async def on_sample_end(self, data: Any) -> None:
            await _in_thread(partial(self._samples.end, data))

        async def on_task_end(self, data: Any) -> None:
            await _in_thread(partial(self._samples.cancel_rest, "eval_id", data.eval_id))

        async def on_run_end(self, data: Any) -> None:
            await _in_thread(partial(self._samples.cancel_rest, "run_id", data.run_id))

    registered: type = hooks(name="samples", description="Stores each sample in evalstore")(EvalstoreHooks)
    return registered


def is_on() -> bool:
    """Return whether EVALSTORE_INSPECT is on. Inspect asks often. Raises InvalidSettings."""
    if "EVALSTORE_INSPECT" not in os.environ:
        return False
    from models.settings import settings  # noqa: PLC0415 - see the docstring of the module

    return settings().inspect == "on"


async def _in_thread(work: Callable[[], None]) -> None:
    from anyio import to_thread  # noqa: PLC0415 - a dependency of Inspect

    await to_thread.run_sync(work)


@dataclass
class _Sample:
    """A sample that has not ended."""

    run_id: str
    eval_id: str
    attempt: int = 1


class Samples:
    """The samples of a process, from Inspect's events. `tasks` holds the metadata of each task that runs."""

    def __init__(self) -> None:
        self.tasks: dict[str, Json] = {}
        self._open: dict[str, _Sample] = {}

    def queue(self, data: Any) -> None:
        """Send the queued event, with the sample's input as code."""
        self._open[data.sample_id] = _Sample(data.run_id, data.eval_id)
        summary = data.summary
        named = {"inspect_eval_id": data.eval_id, "sample_id": str(summary.id), "epoch": summary.epoch}
        _send(
            _event(
                "queued",
                data.sample_id,
                1,
                code=summary.input if isinstance(summary.input, str) else _lines(summary.input),
                language="text",
                run_id=data.run_id,
                metadata=self.tasks.get(data.eval_id, {}) | named,
            )
        )

    def start(self, data: Any) -> None:
        """Send the started event of an attempt."""
        self._open.setdefault(data.sample_id, _Sample(data.run_id, data.eval_id)).attempt = data.attempt
        _send(_event("started", data.sample_id, data.attempt))

    def retry(self, data: Any) -> None:
        """Send the ending of an attempt that Inspect repeats."""
        self._open[data.sample_id].attempt = data.attempt + 1
        _send(_event("failed", data.sample_id, data.attempt, error=_error_text(data.error)))

    def end(self, data: Any) -> None:
        """Send the ending, with scores and transcript."""
        sample = self._open.pop(data.sample_id, None)
        _send(ending(data.sample, data.sample_id, sample.attempt if sample else 1))

    def cancel_rest(self, name: str, value: str) -> None:
        """Cancel the samples of a task or run that ended without them."""
        for sample_id, sample in list(self._open.items()):
            if getattr(sample, name) == value:
                del self._open[sample_id]
                _send(_event("cancelled", sample_id, sample.attempt, reason="the eval ended before the sample"))
        if name == "eval_id":
            self.tasks.pop(value, None)


def ending(sample: Any, eval_id: str, attempt: int) -> Json:
    """Build the ending of a sample.

    An error is failed. A cancelled sample and one that an operator stopped are cancelled. The time and working limits are
    timed_out. All else is completed, also at another limit: Inspect scores such a sample.
    """
    from tasks.endings import as_reason  # noqa: PLC0415 - see the docstring of the module

    values = {name: _as_json(score.value) for name, score in (sample.scores or {}).items()}
    metadata: Json = {"scores": values} if values else {}
    if sample.limit is not None:
        metadata["limit"] = {"type": sample.limit.type, "limit": _as_json(sample.limit.limit)}
    is_cancelled = sample.error is not None and sample.error.message.startswith(_CANCELLED)
    if is_cancelled or (sample.error is None and sample.limit is not None and sample.limit.type == "operator"):
        reason = sample.error.message if is_cancelled else sample.limit.reason or "stopped by an operator"
        return _event("cancelled", eval_id, attempt, reason=as_reason(reason), metadata=metadata)
    fields: Json = {"metadata": metadata, "output": transcript(sample, _max_content_bytes())}
    if sample.total_time is not None:
        fields["duration_ms"] = sample.total_time * 1000
    if sample.error is not None:
        return _event("failed", eval_id, attempt, error=_error_text(sample.error), **fields)
    if sample.limit is not None and sample.limit.type in _TIME_LIMITS:
        return _event("timed_out", eval_id, attempt, **fields)
    return _event("completed", eval_id, attempt, exit_code=0, score=_number(next(iter(values.values()), None)), **fields)


def transcript(sample: Any, max_bytes: int) -> str | None:
    """Return the events of a sample as lines of JSON. Its messages if the events are too large; None if these are, too."""
    for items in (sample.events, sample.messages):
        text = _lines([*items, sample.attachments] if sample.attachments else items)
        if text and len(text.encode("utf-8", "surrogatepass")) <= max_bytes:
            return text
    return None


def _lines(items: list[Any]) -> str:
    lines = (json.dumps(item) if isinstance(item, dict) else item.model_dump_json(exclude_none=True) for item in items)
    return "".join(f"{line}\n" for line in lines)


def _max_content_bytes() -> int:
    from models.settings import settings  # noqa: PLC0415 - see the docstring of the module
    from tasks.uploads import MAX_INLINE_BYTES  # noqa: PLC0415

    return settings().max_content_bytes if settings().object_store_url else MAX_INLINE_BYTES


def _event(type_: str, eval_id: str, attempt: int, **fields: Any) -> Json:
    from tasks.endings import event  # noqa: PLC0415 - see the docstring of the module

    return event(type_, eval_id, attempt, **fields)


def _send(event: Json) -> None:
    """Send one event, for up to a minute of an outage. Without its metadata if these cannot be stored.

    Raises Outage and InvalidEvent, which Inspect logs as a warning.
    """
    from models.errors import InvalidEvent, Outage  # noqa: PLC0415 - see the docstring of the module
    from tasks import store_evaluations  # noqa: PLC0415

    give_up_at = time.monotonic() + _PATIENCE_S
    while True:
        try:
            store_evaluations([event])
        except InvalidEvent:
            if "metadata" not in event:
                raise
            event = {name: value for name, value in event.items() if name != "metadata"}
        except Outage:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(_RETRY_S)
        else:
            return


def _error_text(error: Any) -> str:
    return "" if error is None else f"{error.message}\n{error.traceback}"


def _as_json(value: Any) -> Any:
    """Return a score's value in JSON's types, with NaN and the infinities as text."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def _number(value: Any) -> float | None:
    """Return a score as a number, with Inspect's letters for correct, partial, incorrect and no answer. None if it is none."""
    if isinstance(value, str):
        value = _GRADES.get(value, _GRADES.get(value.lower(), value))
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
