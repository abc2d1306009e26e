"""The breaker shows as it is."""

from worker.breaker import Breaker, BreakerLimits
from worker.metrics import WorkerMetrics


def test_a_probe_that_turns_out_bad_after_another_one_was_stored_does_not_show_the_breaker_open() -> None:
    metrics = WorkerMetrics()
    breaker = Breaker(BreakerLimits(), metrics.counters)

    breaker.report_open({b"id": b"{}"})  # nothing would ever say that it is closed: it is

    assert metrics.counters.get("evalstore_breaker_open") == 0
