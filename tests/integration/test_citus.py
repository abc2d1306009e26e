"""Storing uses statements that Citus takes, where Citus is installed.

Citus cannot be installed for tests. These statements do the same on any server.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from evalstore.storage import database, event_store, event_writer, sessions
from models import merge
from tests.factories import parsed_event as event
from tests.integration.test_store import assert_row_is, store

Json = dict[str, Any]


@pytest.fixture(params=["few", "many"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_writer, "_PIPELINE_ROWS", 64 if request.param == "few" else 0)


@pytest.fixture
def plain(database_url: str) -> Iterator[psycopg.Connection[Json]]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as conn:
        yield conn


@pytest.mark.usefixtures("both_ways")
def test_records_are_locked_one_by_one_where_citus_is_installed(
    database_url: str, plain: psycopg.Connection[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_HAS_CITUS", "true")
    made = database.engine(database_url, pool_size=6)
    sent: list[bytes] = []
    execute = psycopg.Cursor.execute

    def recording(cursor: Any, query: Any, *args: Any, **given: Any) -> Any:
        sent.append(query.encode() if isinstance(query, str) else query)
        return execute(cursor, query, *args, **given)

    monkeypatch.setattr(psycopg.Cursor, "execute", recording)
    events = [event("running", number, eval_id=f"e{number % 7}", metadata={"n": number}) for number in range(70)]
    batches = [events[start::4] for start in range(4)] * 2
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda batch: store(made, batch), batches))
    assert Counter(outcome for stored in done for outcome in stored.outcomes) == {"applied": 70, "duplicate": 70}
    with made.connect() as conn:
        for number in range(7):
            assert_row_is(merge([one for one in events if one.eval_id == f"e{number}"]), conn, plain)
    plain.execute("UPDATE evaluations SET merge_state = NULL, merge_version = NULL")
    again = store(made, [event("running", 100, eval_id=f"e{number}") for number in range(7)])
    assert again.rebuilt == {"absent": 7}
    with psycopg.connect(database_url) as holder, made.connect() as conn:
        holder.execute("SELECT FROM evaluations WHERE eval_id = 'e3' FOR UPDATE")
        assert event_store.locked(conn, [*(f"e{number}" for number in range(7)), "none"]) == {"e3"}
    made.dispose()
    assert not [query for query in sent if b"LATERAL" in query]
    locks = {query for query in sent if b"FOR NO KEY UPDATE" in query and b"SKIP LOCKED" not in query}
    assert locks
    assert not [query for query in locks if b"ANY" in query]
