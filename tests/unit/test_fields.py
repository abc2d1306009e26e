"""What derives from the table of fields agrees with it."""

from datetime import UTC, datetime
from typing import Any, assert_type, get_args
from uuid import UUID

import pytest

from evalstore.api.schemas import SCHEMAS
from evalstore.client.responses import Evaluation
from evalstore.storage.tables import evaluation_events, evaluations
from models import EvaluationCompleted, EvaluationQueued, Event, Record, merge
from models.fields import CONTENTS, EVENT_COLUMNS, FIELDS, FROM_QUEUED, FROM_RESULT, FROM_STARTED, RECORD_COLUMNS, SCALARS, SENT
from models.record import EventRow, RecordRow, canonical_json, demote, promote, to_row

ID, AT = UUID(int=1), datetime(2026, 1, 31, tzinfo=UTC)
MODELS = {model.model_fields["type"].default.removeprefix("evaluation:"): model for model in get_args(Event)}
COMPANIONS = {f"{name}{form}" for name in CONTENTS for form in ("_b64", "_ref")}


@pytest.mark.parametrize("type_", SENT)
def test_each_event_model_has_the_fields_that_the_table_gives_it(type_: str) -> None:
    fields = MODELS[type_].model_fields
    assert set(fields) - COMPANIONS - {"type"} == {field.name for field in FIELDS if type_ in field.events}
    required = {field.name for field in FIELDS if type_ in field.required and not field.is_content}
    assert {name for name, field in fields.items() if field.is_required()} == required


def test_each_field_is_in_the_table_once_and_is_documented() -> None:
    assert len({field.name for field in FIELDS}) == len(FIELDS)
    assert all(field.doc for field in FIELDS)
    assert {field.name for field in FIELDS} <= EVENT_COLUMNS.keys()


def test_the_sources_of_the_record_cover_the_scalars_and_their_columns_are_neighbours() -> None:
    assert {*FROM_QUEUED, *FROM_RESULT, *FROM_STARTED, "executor_id", "container_id"} == set(SCALARS)
    for row in (EventRow, RecordRow):
        assert row._fields[row._fields.index(SCALARS[0]) :][: len(SCALARS)] == SCALARS
        for names in (FROM_QUEUED, FROM_RESULT, FROM_STARTED):
            assert row._fields[row._fields.index(names[0]) :][: len(names)] == names


def test_rows_tables_records_and_schemas_have_the_scalars() -> None:
    assert EventRow._fields == tuple(EVENT_COLUMNS)
    assert RecordRow._fields == tuple(RECORD_COLUMNS)
    assert set(evaluation_events.columns.keys()) == {*EVENT_COLUMNS, "recorded_at"}
    assert set(evaluations.columns.keys()) >= {*RECORD_COLUMNS, "created_at", "updated_at"}
    for names in (
        Record.model_fields,
        Evaluation.model_fields,
        SCHEMAS["Record"]["properties"],
        SCHEMAS["Listed"]["properties"],
    ):
        assert set(SCALARS) <= set(names)
    queued = {field.name for field in FIELDS if "queued" in field.events}
    assert queued == set(SCHEMAS["NewEvaluation"]["properties"]) - COMPANIONS - {"type"}
    for name in ("Change", "Event"):
        assert {field.name for field in FIELDS} | COMPANIONS <= set(SCHEMAS[name]["properties"])


def test_type_checkers_know_the_types_of_the_attributes() -> None:
    queued = EvaluationQueued(eval_id="e", event_id=ID, occurred_at=AT, code="c", run_id="r")
    ended = EvaluationCompleted(eval_id="e", event_id=UUID(int=2), occurred_at=AT, exit_code=0, score=1.5)
    row, record = to_row(ended), merge([queued, ended])
    assert_type(ended.exit_code, int)
    assert_type(row.score, float | None)
    assert_type(row.event_id, UUID)
    assert_type(record.run_id, str | None)
    assert (queued.run_id, row.score, row.exit_code, record.run_id, record.score) == ("r", 1.5, 0, "r", 1.5)


@pytest.mark.parametrize(
    ("values", "columns", "left"),
    [
        ({"run_id": "r"}, {"run_id": "r"}, None),
        ({"run_id": "r", "future": [1]}, {"run_id": "r"}, '{"future":[1]}'),
        ({"run_id": "no id"}, {}, '{"run_id":"no id"}'),
        ({"run_id": 5}, {}, '{"run_id":5}'),
        ({"score": 1}, {}, '{"score":1}'),
    ],
    ids=str,
)
def test_what_extra_holds_is_promoted_to_the_columns_of_its_type(
    values: dict[str, Any], columns: dict[str, Any], left: str | None
) -> None:
    bare = to_row(EvaluationQueued(eval_id="e", event_id=ID, occurred_at=AT, code="c"))
    kept = bare._replace(extra=canonical_json(values))
    promoted = promote(kept)
    assert promoted == bare._replace(**columns, extra=left)
    assert demote(promoted, kept.extra) == (kept if columns else None)


def test_a_row_without_extra_is_promoted_to_itself() -> None:
    row = to_row(EvaluationQueued(eval_id="e", event_id=ID, occurred_at=AT, code="c"))
    assert promote(row) is row
    assert demote(row, None) is None
