"""The breaker shows as it is."""

from worker.handler import Store
from worker.in_flight import Hold
from worker.metrics import Metrics


def test_a_probe_that_turns_out_bad_after_another_one_was_stored_does_not_show_the_breaker_open() -> None:
    metrics = Metrics()
    store = Store(Hold(), metrics=metrics)

    store._shout({b"id": b"{}"})  # nothing would ever say that it is closed: it is

    assert metrics.ledger.get("evalstore_breaker_open") == 0
