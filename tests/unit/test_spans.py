"""What a message says of its trace is believed where OpenTelemetry's own reader believes it, and nowhere else."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from worker.batch_spans import below, is_sampled, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-ff", f"cc-{TRACE}-{SPAN}-01-what-follows"]
BAD: list[Any] = [
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{TRACE[:-2]}  -{SPAN}-01",
    f"00-{TRACE}-{SPAN}-+1",
    f"00_{TRACE}-{SPAN}-01",
    f"00-{TRACE}-{SPAN}-1",
    "",
    "\udc80" * 55,
    5,
    None,
]


def by_opentelemetry(traceparent: str) -> tuple[bytes, bytes, bool] | None:
    found = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": traceparent})).get_span_context()
    sampled = bool(found.trace_flags & 1)
    return (found.trace_id.to_bytes(16), found.span_id.to_bytes(8), sampled) if found.is_valid else None


def by_us(traceparent: Any) -> tuple[bytes, bytes, bool] | None:
    found = parse_traceparent(traceparent)
    return (bytes.fromhex(found[3:35]), bytes.fromhex(found[36:52]), is_sampled(found)) if found else None


@pytest.mark.parametrize("traceparent", GOOD)
def test_a_well_formed_traceparent_is_accepted(traceparent: str) -> None:
    assert by_us(traceparent) == by_opentelemetry(traceparent) is not None


@pytest.mark.parametrize("traceparent", BAD, ids=ascii)
def test_a_malformed_traceparent_is_ignored(traceparent: Any) -> None:
    assert by_us(traceparent) is None
    if isinstance(traceparent, str):
        assert by_opentelemetry(traceparent) is None


@settings(deadline=None)
@given(st.text("0f-A \n", min_size=55, max_size=56) | st.integers(0, 54).map(lambda at: GOOD[0][:at] + "G" + GOOD[0][at + 1 :]))
def test_a_traceparent_that_opentelemetry_refuses_is_refused(traceparent: str) -> None:
    assert by_us(traceparent) == by_opentelemetry(traceparent)


def test_a_trace_goes_on_below_our_span_or_as_it_came() -> None:
    span_id = bytes([1]) * 8
    assert below(parse_traceparent(GOOD[0]), span_id) == f"00-{TRACE}-{span_id.hex()}-01"
    assert below(parse_traceparent(f"00-{TRACE}-{SPAN}-f0"), span_id) == GOOD[1]
    assert below("", span_id) == ""
