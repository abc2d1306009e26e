"""The anomaly detector finds what was planted into executions that were measured, and nothing in ordinary ones."""

import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from tests.executions import DIMENSIONS, Execution, executions, planted

pytest.importorskip("river", reason="river is not installed: run `make setup-integrations`")

from evalstore.sinks import anomaly_state
from evalstore.sinks.anomaly_detector import METRICS, Detector, Group, Model, Series, Sign, values_of
from evalstore.storage import detector_state

NORMAL = executions("normal")


def detector(max_groups: int = 500) -> Detector:
    return Detector(max_groups, 20)


def feed(found: Detector, rows: Iterable[Execution], start: int = 0) -> Iterator[tuple[int, Sign]]:
    """Give executions to a detector; yields what it finds, with the number of the execution."""
    for number, row in enumerate(rows, start):
        values = values_of({"type": "evaluation:completed", **row.fields}, row.output_bytes)
        for dimension, value in row.groups(number).items():
            for sign in found.arrive(dimension, value, number * 0.7, f"e-{number}"):
                yield number, sign
            for sign in found.finish(dimension, value, values, f"e-{number}"):
                yield number, sign


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_in_10000_normal_executions(seed: int) -> None:
    rows = random.Random(seed).sample(NORMAL, len(NORMAL))  # noqa: S311
    assert len(rows) == 10_000
    assert list(feed(detector(), rows)) == []


@pytest.mark.parametrize("before", [500, 3000, 10_000])
@pytest.mark.parametrize(
    ("case", "metric", "kind"),
    [("slow", "duration_ms", "drift"), ("failing", "failure_rate", "drift"), ("memory", "memory_bytes", "outlier")],
)
def test_what_is_planted_is_found_within_500_executions(case: str, metric: str, kind: str, before: int) -> None:
    found = list(feed(detector(), planted(case, before)))
    assert all(number >= before for number, _ in found)
    signs = [(number - before, sign) for number, sign in found if (sign.metric, sign.kind) == (metric, kind)]
    assert signs[0][0] < 500
    first = signs[0][1]
    assert first.observed > 1.3 * first.expected
    assert first.eval_ids
    # Greedy programs take longer, too.
    assert {sign.metric for _, sign in found} - {"duration_ms"} <= {metric}
    assert {sign.dimension for _, sign in signs} & set(DIMENSIONS)


def test_the_evaluations_of_a_finding_are_those_that_show_it() -> None:
    rows = planted("memory", 2000)
    for number, sign in feed(detector(), rows):
        ids = [int(eval_id.removeprefix("e-")) for eval_id in sign.eval_ids]
        assert ids[-1] == number
        assert all(rows[one].fields["memory_bytes"] > 3 * sign.expected for one in ids)


def test_the_way_back_to_normal_is_no_finding() -> None:
    rows = [*planted("slow", 2000), *NORMAL[2000:5000]]
    numbers = [number for number, sign in feed(detector(), rows) if sign.dimension == "language"]
    assert numbers
    assert max(numbers) < 2500


def test_a_slow_creep_is_found_although_no_step_is_large() -> None:
    one, rng = Series(METRICS["duration_ms"]), random.Random(5)  # noqa: S311
    found = [
        number for number in range(12_000) if one.add(100 * (1 + number / 12_000) * rng.lognormvariate(0, 0.1), f"e-{number}")
    ]
    assert found


def test_a_burst_of_arrivals_and_a_lasting_change_of_their_rate_are_found() -> None:
    for factor, kinds in ((20, {"outlier", "drift"}), (1, set())):
        found, at, rng = detector(), 0.0, random.Random(7)  # noqa: S311
        signs = list[Sign]()
        for number in range(30_000):
            at += rng.expovariate(1) / (factor if number > 15_000 else 1)
            signs += found.arrive("submitter", "alice", at, f"e-{number}")
        assert {sign.kind for sign in signs} <= kinds
        assert bool(signs) == bool(kinds)
        assert {sign.metric for sign in signs} <= {"arrivals_per_minute"}


def test_a_million_names_that_senders_make_up_take_no_room_from_others() -> None:
    found = detector(max_groups=50)
    values = {"failure_rate": 0.0}
    for number in range(1_000_000):
        list(found.finish("submitter", f"made-up-{number}", values, "e"))
        if number % 1000 == 0:
            for name in range(40):
                list(found.finish("submitter", f"real-{name}", values, "e"))
    assert found.models["submitter"].keys() == {Group.of("submitter", f"real-{name}") for name in range(40)}
    assert len(found._candidates) <= 10_000


def test_the_group_unused_for_longest_makes_room() -> None:
    found = detector(max_groups=2)
    for name in ("a", "b", "a", "c"):
        for _ in range(20):
            list(found.finish("executor", name, {"failure_rate": 0.0}, "e"))
    assert list(found.models["executor"]) == [Group.of("executor", "a"), Group.of("executor", "c")]
    assert found.removed == {Group.of("executor", "b")}


def saved(model: Model) -> detector_state.SavedGroup:
    return detector_state.saved("language", "key", model.used, anomaly_state.dump(model))


def test_a_detector_read_back_finds_the_same_as_one_that_was_kept() -> None:
    rows = planted("slow", 1500)
    kept, stopped = detector(), detector()
    for number, row in enumerate(rows):
        expected = [sign._replace(eval_ids=()) for _, sign in feed(kept, [row], number)]
        if number % 100 == 0:
            again = detector()
            models = [(group, one) for models in stopped.models.values() for group, one in models.items()]
            for group, one in sorted(models, key=lambda found: found[1].used):
                again.load(group, anomaly_state.load(saved(one)))
            again._candidates, stopped = stopped._candidates, again
        assert [sign._replace(eval_ids=()) for _, sign in feed(stopped, [row], number)] == expected


def test_state_is_small_and_names_no_evaluation() -> None:
    found = detector()
    list(feed(found, NORMAL))
    for models in found.models.values():
        for one in models.values():
            state = anomaly_state.dump(one)
            assert len(state) < 16_000
            assert b"e-9" not in state


@pytest.mark.parametrize("damage", [b"", b"x", b"\x00" * 100])
def test_damaged_state_is_noticed_before_it_is_read(damage: bytes) -> None:
    one = saved(Model())
    with pytest.raises(anomaly_state.UnreadableState, match="damaged"):
        anomaly_state.load(one._replace(state=damage))
    with pytest.raises(anomaly_state.UnreadableState):
        anomaly_state.load(detector_state.saved("language", "key", 1, damage))


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"type": "evaluation:completed", "exit_code": 0}, 0.0),
        ({"type": "evaluation:completed", "exit_code": 3}, 1.0),
        ({"type": "evaluation:failed"}, 1.0),
        ({"type": "evaluation:timed_out"}, 1.0),
        ({"type": "evaluation:lost"}, 1.0),
    ],
)
def test_failures_are_all_endings_but_an_exit_code_of_0(fields: dict[str, Any], value: float) -> None:
    assert values_of(fields, None) == {"failure_rate": value}


@pytest.mark.parametrize("value", [0.0, -5.0, 1e308, 5e-324])
def test_any_number_that_an_event_may_hold_is_taken(value: float) -> None:
    for metric in METRICS.keys() - {"failure_rate"}:
        one = Series(METRICS[metric])
        for number in range(500):
            one.add(value if number > 300 else 10.0, "e")
