"""A service with something on every page of the console, for tests, screenshots and measurements."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import redis
from sqlalchemy import Connection

from evalstore.storage import (
    api_keys,
    database,
    dead_letters,
    event_store,
    operator_actions,
    redrives,
    rollups,
    sink_cursors,
    webhooks,
)
from evalstore.storage.dead_letters import DeadLetterInsert
from evalstore.storage.operator_actions import Intent
from evalstore.storage.redrives import Pace
from evalstore.storage.visibility import Visibility
from models.events import parse
from models.webhooks import Subscription
from tasks.keys import Names
from tests import factories

# One evaluation that completed in the first run fails in the second.
ENDINGS = {"a": "completed", "b": "failed"}
CAUSES = (
    ("InvalidEvent", "exit_code: expected an integer, not 'one'"),
    ("InvalidEvent", "output: 200 bytes, expected at most 100"),
    ("EventIdReused", "already stored with another body"),
)


def store(conn: Connection, *, text: str = "judge", prefix: str = "demo") -> list[str]:
    """Store evaluations of each status whose fields of free text are `text`, in two runs. Return their ids."""
    eval_ids = []
    for run in ("a", "b"):
        for number, ending in enumerate(("completed", ENDINGS[run], "failed", "timed_out", "cancelled", None)):
            eval_id = f"{prefix}-{run}-{number}"
            eval_ids.append(eval_id)
            at = datetime.now(UTC) - timedelta(minutes=30 - number)
            queued = {
                "code": f"print('{text}')\n# {text}\n",
                "run_id": f"{prefix}-{run}",
                "submitter": text[:1000],
                "language": text[:1000] if number == 1 else "python",
                "metadata": {text[:200]: text[:8000], "team": "blue"},
            }
            results: dict[str, dict[str, Any]] = {
                "completed": {
                    "exit_code": 0,
                    "output": f"score\x1b[32m {text}\x1b[0m\n" * 20,
                    "error": text,
                    "score": 0.5 + number / 10 - (0.2 if run == "b" else 0),
                    "duration_ms": 1200.0 * (number + 1),
                    "memory_bytes": 64_000_000,
                },
                "failed": {"exit_code": 1, "output": text, "error": f"Traceback\nValueError: {text}", "duration_ms": 300},
                "timed_out": {"output": text, "error": text, "duration_ms": 60_000},
                "cancelled": {"reason": text[:1000]},
            }
            events = [factories.unique_event("queued", eval_id, **queued)]
            events += [
                factories.unique_event("started", eval_id, executor_id=text[:1000], container_id=text[:1000], timeout_s=60)
            ]
            if ending:
                events.append(factories.unique_event(ending, eval_id, **results[ending]))
            for place, event in enumerate(events):
                event["occurred_at"] = (at + timedelta(seconds=place)).isoformat()
            event_store.store(conn, [parse(event) for event in events])
    return eval_ids


def sum_up(conn: Connection) -> None:
    """Keep the sums of runs, as the process of sinks does."""
    sink_cursors.create(conn, rollups.NAME, "statistics")
    lease = sink_cursors.claim(conn, rollups.NAME, "test")
    assert lease is not None
    with database.errors(), conn.begin():
        ids = [row[0] for row in database.driver(conn).execute("SELECT eval_id FROM evaluations")]
    rollups.apply(conn, lease, lease.cursor, ids, [])
    sink_cursors.release(conn, lease)


def message(event: dict[str, Any], text: str = "") -> bytes:
    """Return a Dramatiq message with an event."""
    body = {
        "queue_name": "evaluations",
        "actor_name": "store_evaluation",
        "args": [event],
        "kwargs": {},
        "options": {"note": text} if text else {},
        "message_id": str(uuid4()),
        "message_timestamp": 1_769_000_000_000,
    }
    return json.dumps(body).encode()


def letters(count: int, *, text: str = "", causes: tuple[tuple[str, str], ...] = CAUSES) -> list[DeadLetterInsert]:
    """Return that many dead letters, in a group for each cause. Their messages can be stored."""
    made = []
    for number in range(count):
        error_class, error_message = causes[number % len(causes)]
        event = factories.unique_event("completed", f"dead-{number}", exit_code=0, output=text or "x" * 200)
        made.append(
            DeadLetterInsert(
                id=uuid4(),
                queue="evaluations",
                actor=text or "store_evaluation",
                eval_id=event["eval_id"],
                event_id=UUID(event["event_id"]),
                message=message(event, text),
                error_class=error_class,
                error_message=f"{error_message} {text}".strip(),
                traceback=f'Traceback (most recent call last):\n  File "w.py", line 7\n{error_class}: {error_message} {text}',
                signature=dead_letters.signature(error_class, error_message),
                attempts=1,
                died_at=datetime.now(UTC) - timedelta(minutes=number % 500),
                host=text or "worker-1",
                release=text[:50] or "0.2.0",
            )
        )
    return made


def fill(conn: Connection, redis_url: str, *, text: str = "") -> dict[str, str]:
    """Write dead letters, sinks, webhooks, anomalies, keys and actions. Return ids for addresses of pages."""
    some, intent = text or "usual", Intent("edit", text or "key ops", text or "a worker was too strict", {"ids": [text or "1"]})
    made = letters(12, text=text)
    dead_letters.write(conn, made)
    redrive_id, _ = dead_letters.redrive(conn, dead_letters.Selection(ids=(made[0].id,)), intent, Pace(20, 1))
    redrives.end(conn, redrive_id or uuid4(), "stopped", text or "a letter of the canary died again")
    for name, kind in (("kafka-main", "kafka"), ("anomalies", "anomaly")):
        sink_cursors.create(conn, name, kind)
    sum_up(conn)
    subscription = Subscription(f"https://hooks.example/{some[:500]}", (), (), None, text[:1000] or None)
    webhook_id = webhooks.create(conn, subscription, "whsec_dGVzdHRlc3R0ZXN0dGVzdHRlc3R0ZXN0", intent)
    api_keys.create(conn, some, ["read"], visibility=Visibility(some[:1000], "demo-"), intent=intent)
    operator_actions.note(conn, intent, 3, details={"diff": ["--- dead letter", f"-{some}", f"+{some}"], some: some})
    anomaly_id, delivery_id = uuid4(), uuid4()
    with database.errors(), conn.begin():
        raw: psycopg.Connection[Any] = database.driver(conn)
        raw.execute("UPDATE sinks SET last_error = %s WHERE name = 'kafka-main'", [text or "the broker does not answer"])
        raw.execute("UPDATE webhooks SET last_error = %s, failing_since = now() WHERE id = %s", [some, webhook_id])
        raw.execute(
            "INSERT INTO webhook_deliveries (eval_id, id, webhook_id, type, version, state, attempts, status_code, error,"
            " body, created_at, next_at, finished_at) VALUES ('demo-a-0', %s, %s, 'storage:evaluation:created', 1, 'failed',"
            " 3, 500, %s, '{}', now(), now(), now())",
            [delivery_id, webhook_id, some],
        )
        raw.execute(
            "INSERT INTO anomalies (id, sink, kind, dimension, value, group_key, metric, expected, observed, occurrences,"
            " eval_ids, first_at, last_at) VALUES (%s, 'anomalies', 'drift', 'submitter', %s,"
            " 'g', 'failure_rate', 0.02, 0.4, 31, %s, now(), now())",
            [anomaly_id, some, ["demo-a-2", "demo-a-3"]],
        )
    with redis.Redis.from_url(redis_url) as client:
        run = {"outcome": "failed", "started_at": datetime.now(UTC).isoformat(), "seconds": 0.2, "error": some}
        client.hset(Names("dramatiq").last_runs, "sweep_objects", json.dumps(run))
    return {"letter": str(made[1].id), "redrive": str(redrive_id), "webhook": str(webhook_id), "anomaly": str(anomaly_id)}


def paths(ids: dict[str, str]) -> list[str]:
    """Return the address of each page of the console below its root path."""
    return [
        *("", "/evaluations", "/evaluations/demo-a-0", "/evaluations/demo-a-2", "/evaluations/demo-a-5"),
        *("/evaluations/demo-a-0/output", "/evaluations/demo-a-0/code", "/evaluations/demo-a-2/error"),
        *("/runs", "/runs/demo-a", "/compare?a=demo-a&b=demo-b", "/runbook"),
        *("/dead-letters", "/dead-letters?state=all&match=x", "/dead-letters/redrive", f"/dead-letters/{ids['letter']}"),
        *("/redrives", f"/redrives/{ids['redrive']}", "/queues", "/schedule", "/archive", "/sinks", "/sinks/kafka-main"),
        *("/webhooks", f"/webhooks/{ids['webhook']}", "/anomalies", f"/anomalies/{ids['anomaly']}", "/keys", "/audit"),
    ]
