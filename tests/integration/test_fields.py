"""A new field is one line in the table of fields and one migration."""

import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).parents[2]
LINE = '    score: Annotated[Number | None, "what a grader gave"] = None\n'
NEW_LINE = '    tokens: Annotated[Int64 | None, "the tokens it took"] = None\n'

# Runs in a copy of the source with the new field.
USES_THE_FIELD = """
import json, sys
from evalstore.api.schemas import SCHEMAS
from evalstore.client.responses import Evaluation
from evalstore.storage import database, event_store, records, listing, tables
from models.events import check
from models.fast_decode import check_and_encode, decode_event
from models.record import Record, to_row
from docs import generate

event = {"type": "evaluation:completed", "eval_id": "e", "exit_code": 0, "tokens": 2**40}
event |= {"event_id": "0190a2f5-7a4c-7000-8000-000000000000", "occurred_at": "2026-01-31T09:30:00Z"}
row = to_row(check(event))
assert row.tokens == 2**40
assert decode_event(json.dumps(event).encode(), max_content_bytes=1000) == row
assert check_and_encode(event, max_content_bytes=1000) is not None
assert decode_event(json.dumps(event | {"tokens": 2**70}).encode(), max_content_bytes=1000) is None
assert "| `tokens` | completed | 64-bit integer | the tokens it took |" in generate.events()
assert "`tokens`" in generate.record()
assert SCHEMAS["Change"]["properties"]["tokens"]["anyOf"][0]["maximum"] == 2**63 - 1
assert {"tokens"} <= SCHEMAS["Record"]["properties"].keys() & Record.model_fields.keys() & Evaluation.model_fields.keys()
assert all("tokens" in table.columns for table in (tables.evaluations, tables.evaluation_events))
engine = database.engine(sys.argv[1])
with engine.connect() as conn:
    assert event_store.store(conn, [row]).outcomes == ["applied"]
    assert event_store.store(conn, [row] * 100).outcomes == ["duplicate"] * 100
    assert event_store.store(conn, [row._replace(tokens=1)]).outcomes == ["reused"]
    assert event_store.get(conn, "e").tokens == 2**40
    assert records.load(conn, "e").fields["tokens"] == 2**40
    assert records.log(conn, "e", limit=1)[0].fields["tokens"] == 2**40
    assert listing.page(conn, listing.Filter(), limit=1).rows[0]["tokens"] == 2**40
engine.dispose()
print("used")
"""


@pytest.fixture
def changed_source(tmp_path: Path) -> Path:
    """The source with one line more in the table."""
    for room in ("models", "tasks", "worker", "evalstore", "docs"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "models/fields.py"
    before = table.read_text()
    assert LINE in before
    table.write_text(before.replace(LINE, LINE + NEW_LINE))
    return tmp_path


def test_a_line_in_the_table_and_two_columns_make_a_field(changed_source: Path, database_url: str) -> None:
    with psycopg.connect(database_url) as conn:
        for table in ("evaluations", "evaluation_events"):
            conn.execute(f"ALTER TABLE {table} ADD COLUMN tokens bigint")
    script = changed_source / "uses_the_field.py"
    script.write_text(USES_THE_FIELD)
    done = subprocess.run(
        [sys.executable, script, database_url], cwd=changed_source, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("used\n", 0), done.stderr
