"""The schemas and examples of the service's JSON, for its OpenAPI document."""

from collections.abc import Iterable
from typing import Any, Final

from models.anomalies import ANOMALY_DIMENSIONS, ANOMALY_KINDS, ANOMALY_METRICS
from models.confirmations import CONFIRMATIONS
from models.content import MAX_CONTENT_BYTES
from models.fields import CONTENTS, FIELDS, SCALARS
from models.webhooks import EVENT_TYPES

Schema = dict[str, Any]

_FIELDS: Final = {field.name: field for field in FIELDS}
EVAL_ID: Final[Schema] = _FIELDS["eval_id"].kind.schema
STATUSES: Final = ("queued", "running", "completed", "failed", "timed_out", "cancelled", "lost")
ENDED: Final = ("running", "completed", "failed", "timed_out", "cancelled")
_TIME: Final[Schema] = _FIELDS["occurred_at"].kind.schema
_UUID: Final[Schema] = _FIELDS["event_id"].kind.schema
_ATTEMPT: Final[Schema] = _FIELDS["attempt"].kind.schema


def ref(name: str) -> Schema:
    """Refer to a schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _content(name: str) -> dict[str, Schema]:
    limit = f"Any string, up to {MAX_CONTENT_BYTES // 1024**2} MiB. It is kept exactly."
    return {
        name: _nullable({"type": "string", "description": limit}),
        f"{name}_b64": _nullable({"type": "string", "contentEncoding": "base64", "description": f"{name} as raw bytes."}),
        f"{name}_ref": _nullable({**ref("Reference"), "description": f"{name} that was uploaded before."}),
    }


def _given(names: Iterable[str]) -> dict[str, Schema]:
    """Return the schemas of fields in requests."""
    given: dict[str, Schema] = {}
    for field in map(_FIELDS.__getitem__, names):
        described = {**field.kind.schema, "description": f"{field.doc[0].upper()}{field.doc[1:]}."}
        given |= _content(field.name) if field.is_content else {field.name: _nullable(described)}
    return given


_COMMON: Final = _given(("event_id", "occurred_at", "attempt", "metadata"))
_QUEUED: Final = _given(field.name for field in FIELDS if field.events == ("queued",))
_LATER: Final = _given(name for name in (*SCALARS, *CONTENTS) if name not in _QUEUED)
_STATE: Final[dict[str, Schema]] = {
    "eval_id": EVAL_ID,
    "status": {"type": "string", "enum": list(STATUSES)},
    "attempt": _ATTEMPT,
    "version": {"type": "integer", "minimum": 1, "description": "The number of its events; also the ETag."},
    **{name: _nullable(_FIELDS[name].kind.schema) for name in SCALARS},
    "metadata": {"type": "object"},
    **{name: _nullable(_TIME) for name in ("queued_at", "started_at", "finished_at")},
    "created_at": _TIME,
    "updated_at": _TIME,
}

_TRUNCATED: Final[dict[str, Schema]] = {
    "metadata_truncated": {"const": True, "description": "Where `metadata` is less than its events gave."}
}
_ENRICHMENT: Final[dict[str, Schema]] = {
    "enrichment": {"type": "object", "description": "Where enrichers are installed: what they returned for its events."}
}
_PROVISIONAL: Final[dict[str, Schema]] = {
    "provisional": {"const": True, "description": "With `as_of`: where a commit under way may still change the answer."}
}


def _shown(kind: str) -> dict[str, Schema]:
    return {
        kind: _nullable({"type": "string", "description": "If it is text and up to 64 KiB."}),
        f"{kind}_b64": {"type": "string", "description": "If it is not text, and up to 64 KiB."},
        f"{kind}_size": {"type": "integer", "minimum": 0, "description": "Bytes."},
        f"{kind}_preview": {"type": "string", "description": "The beginning of larger content."},
        f"{kind}_url": {"type": "string", "description": "The address of larger content."},
    }


_CONTENTS: Final = {name: schema for kind in CONTENTS for name, schema in _shown(kind).items()}
_EVENT_TYPES: Final = [f"evaluation:{name}" for name in ("queued", "started", "running", *ENDED[1:])]
_OUTCOMES: Final = ["applied", "duplicate", "reused", "erased", "invalid", "accepted"]
_FAULTS: Final[Schema] = {"type": "array", "items": ref("Fault")}

_SUBSCRIPTION: Final[dict[str, Schema]] = {
    "url": {"type": "string", "maxLength": 2000, "description": "https; http for networks in EVALSTORE_WEBHOOK_ALLOW alone."},
    "event_types": {
        "type": "array",
        "items": {"type": "string", "enum": [*EVENT_TYPES, *CONFIRMATIONS]},
        "description": "Types of events or of confirmations; one of them has to match. Empty: all.",
    },
    "statuses": {"type": "array", "items": {"type": "string", "enum": list(STATUSES)}, "description": "Empty: all."},
    "run_id": _nullable({**EVAL_ID, "description": "Only evaluations of this run."}),
    "submitter": _nullable({"type": "string", "maxLength": 1000, "description": "Only evaluations of this submitter."}),
}
_SECRET: Final[Schema] = {"type": "string", "pattern": "^whsec_", "description": "whsec_ and the base64 of 24 to 64 bytes."}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_WEBHOOK: Final[dict[str, Schema]] = {
    "id": _UUID,
    **_SUBSCRIPTION,
    "state": {"type": "string", "enum": ["active", "disabled"]},
    "created_by": {"type": "string"},
    "created_at": _TIME,
    "delivered": _COUNT,
    "failed": {**_COUNT, "description": "Attempts that failed."},
    "pending": {**_COUNT, "description": "Deliveries that wait, counted up to 10,000."},
    "delivered_at": _nullable(_TIME),
    "last_error": _nullable({"type": "string"}),
    "failing_since": _nullable(_TIME),
    "disabled_at": _nullable(_TIME),
    "previous_valid_until": _nullable({**_TIME, "description": "Until then the secret before the last rotation signs, too."}),
}
_DELIVERY: Final[dict[str, Schema]] = {
    "id": {**_UUID, "description": "The header webhook-id."},
    "webhook_id": _UUID,
    "type": {"type": "string"},
    "eval_id": _nullable(EVAL_ID),
    "version": _COUNT,
    "state": {"type": "string", "enum": ["pending", "delivered", "failed"]},
    "attempts": _COUNT,
    "status_code": _nullable({"type": "integer"}),
    "error": _nullable({"type": "string"}),
    "created_at": _TIME,
    "next_at": _nullable(_TIME),
    "finished_at": _nullable(_TIME),
}


_ANOMALY: Final[dict[str, Schema]] = {
    "id": _UUID,
    "sink": {"type": "string"},
    "kind": {"type": "string", "enum": list(ANOMALY_KINDS)},
    "dimension": {"type": "string", "enum": list(ANOMALY_DIMENSIONS)},
    "value": {"type": "string", "description": "The language, submitter or executor."},
    "metric": {"type": "string", "enum": list(ANOMALY_METRICS)},
    "expected": {"type": "number", "description": "The level before; of an outlier the mean."},
    "observed": {"type": "number", "description": "The latest level or outlier."},
    "occurrences": {**_COUNT, "description": "How often it was seen."},
    "eval_ids": {"type": "array", "items": EVAL_ID, "description": "The first and the last evaluations that show it."},
    "detected_at": _TIME,
    "first_at": _TIME,
    "last_at": _TIME,
    "state": {"type": "string", "enum": ["open", "acknowledged"]},
    "acknowledged_by": _nullable({"type": "string"}),
    "acknowledged_at": _nullable(_TIME),
    "reason": _nullable({"type": "string"}),
}


def _object(properties: dict[str, Schema], required: Iterable[str] | None = None, **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties if required is None else required), **more}


WEBHOOKS: Final[dict[str, Schema]] = {
    "Subscription": _object(
        {**_SUBSCRIPTION, "secret": _nullable(_SECRET)},
        ["url"],
        additionalProperties=False,
        examples=[{"url": "https://hooks.example.com/evalstore", "statuses": ["failed", "timed_out"], "run_id": "run-1"}],
    ),
    "Webhook": _object(_WEBHOOK),
    "NewWebhook": _object({**_WEBHOOK, "secret": _SECRET}),
    "Webhooks": _object({"webhooks": {"type": "array", "items": ref("Webhook")}}),
    "Rotation": _object(
        {
            "secret": _nullable({**_SECRET, "description": "By default a new one is made."}),
            "overlap_s": {"type": "number", "minimum": 0, "maximum": 2_592_000, "description": "By default a day."},
        },
        [],
        additionalProperties=False,
        examples=[{"overlap_s": 86_400}],
    ),
    "Rotated": _object({"id": _UUID, "secret": _SECRET, "previous_valid_until": _TIME}),
    "Delivery": _object(_DELIVERY),
    "Deliveries": _object({"deliveries": {"type": "array", "items": ref("Delivery")}}),
}

ANOMALIES: Final[dict[str, Schema]] = {
    "Anomaly": _object(_ANOMALY),
    "Anomalies": _object(
        {
            "anomalies": {"type": "array", "items": ref("Anomaly")},
            "next": _nullable({"type": "string", "description": "The cursor of the next page; null at the end."}),
        }
    ),
    "Acknowledgement": _object(
        {"reason": _nullable({"type": "string", "maxLength": 1000})},
        [],
        additionalProperties=False,
        examples=[{"reason": "executor-7 was throttled; replaced"}],
    ),
}
_QUANTILES: Final = _object({name: _nullable({"type": "number"}) for name in ("p50", "p95", "p99")})
_SUMS: Final[dict[str, Schema]] = {
    "evaluations": _COUNT,
    "by_status": _object(dict.fromkeys(STATUSES, _COUNT)),
    "pass_rate": _nullable(
        {
            "type": "number",
            "description": "Completed with exit code 0, divided by completed, failed, timed out and lost; null for none.",
        }
    ),
    "mean_score": _nullable({"type": "number"}),
    "duration_ms": {**_QUANTILES, "description": "Within 1 %."},
    "memory_bytes": {**_QUANTILES, "description": "Within 1 %."},
}
_RUN: Final[dict[str, Schema]] = {
    "run_id": EVAL_ID,
    "state": {"type": "string", "enum": ["open", "finished"]},
    **_SUMS,
    "unfinished": {**_COUNT, "description": "Queued or running."},
    "expected": _nullable(_COUNT),
    "closed": {"type": "boolean"},
    "first_at": {**_TIME, "description": "When its first evaluation was stored, or the run declared."},
    "last_at": {**_TIME, "description": "When one of its evaluations last changed."},
    "finished_at": _nullable({**_TIME, "description": "When its end was announced."}),
}
RUNS: Final[dict[str, Schema]] = {
    "Run": _object(_RUN),
    "RunPage": _object(
        {
            "runs": {"type": "array", "items": ref("Run")},
            "next": _nullable({"type": "string", "description": "The cursor of the next page; null at the end."}),
        }
    ),
    "RunDeclaration": _object(
        {"expected": _nullable(_COUNT), "closed": {"type": "boolean"}},
        [],
        additionalProperties=False,
        examples=[{"expected": 164}],
    ),
    "Statistics": _object(
        {
            "since": _TIME,
            "until": _TIME,
            "bucket": {"type": "string", "enum": ["hour", "day", "month", "all"]},
            "group_by": _nullable({"type": "string"}),
            "rows": {
                "type": "array",
                "items": _object(
                    {
                        "bucket": _nullable({**_TIME, "description": "Its start; null with bucket=all."}),
                        **{
                            name: _nullable({"type": "string"})
                            for name in ("status", "language", "submitter", "executor", "run")
                        },
                        **_SUMS,
                    },
                    ["bucket", *_SUMS],
                ),
            },
        }
    ),
}

SCHEMAS: Final[dict[str, Schema]] = {
    "NewEvaluation": {
        "type": "object",
        "description": "A queued event. `code` or `code_b64` is required.",
        "properties": {
            "type": {"const": "evaluation:queued"},
            "eval_id": EVAL_ID,
            **_COMMON,
            **_QUEUED,
        },
        "required": ["eval_id"],
        "additionalProperties": False,
        "examples": [
            {"eval_id": "eval-1", "run_id": "run-1", "code": "print(1)", "language": "python", "metadata": {"team": "blue"}}
        ],
    },
    "Reference": {
        "type": "object",
        "description": "Uploaded content: the answer of POST /storage/content.",
        "properties": {
            "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            "size": {"type": "integer", "minimum": 0, "description": "Bytes."},
            "encoding": {"type": "string", "enum": ["identity", "zstd"], "description": "How it is stored."},
        },
        "required": ["sha256", "size", "encoding"],
        "additionalProperties": False,
        "examples": [
            {"sha256": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", "size": 3, "encoding": "identity"}
        ],
    },
    "Change": {
        "type": "object",
        "description": "A status, and the fields of its event.",
        "properties": {
            "status": {"type": "string", "enum": ["queued", *ENDED]},
            "type": {"type": "string", "enum": _EVENT_TYPES, "description": "The event's type, instead of a status."},
            "eval_id": EVAL_ID,
            **_COMMON,
            **_QUEUED,
            **_LATER,
        },
        "additionalProperties": False,
        "examples": [{"status": "completed", "exit_code": 0, "output": "1\n", "duration_ms": 12.5, "score": 0.75}],
    },
    "Event": {
        "type": "object",
        "description": "One fact about an evaluation. The reference of events lists the fields of each type.",
        "properties": {
            "type": {"type": "string", "enum": _EVENT_TYPES},
            "eval_id": EVAL_ID,
            **_COMMON,
            **_QUEUED,
            **_LATER,
        },
        "required": ["type"],
        "additionalProperties": False,
        "examples": [{"type": "evaluation:started", "executor_id": "executor-1"}],
    },
    "Record": {
        "type": "object",
        "properties": {**_STATE, **_ENRICHMENT, **_TRUNCATED, **_PROVISIONAL, **_CONTENTS},
        "required": [*_STATE, "code", "output", "error"],
        "examples": [{"eval_id": "run-1", "status": "completed", "attempt": 1, "version": 3, "exit_code": 0, "output": "1\n"}],
    },
    "Erased": {
        "type": "object",
        "properties": {
            "eval_id": EVAL_ID,
            "events": {"type": "integer", "minimum": 0},
            "objects": {"type": "integer", "minimum": 0, "description": "Those that are gone."},
            "objects_left": {"type": "integer", "minimum": 0, "description": "Those that go with the sweep."},
        },
        "required": ["eval_id", "events", "objects", "objects_left"],
    },
    "Written": {
        "type": "object",
        "description": "The answer to a write of a key without the scope read.",
        "properties": {name: _STATE[name] for name in ("eval_id", "version", "status")},
        "required": ["eval_id", "version", "status"],
    },
    "Listed": {
        "type": "object",
        "description": "A record without its content.",
        "properties": {**_STATE, **_TRUNCATED},
        "required": list(_STATE),
    },
    "Page": {
        "type": "object",
        "properties": {
            "evaluations": {"type": "array", "items": ref("Listed")},
            "next": _nullable({"type": "string", "description": "The cursor of the next page; null at the end."}),
            "total": {"type": "integer", "description": "With total=true: the number of matches."},
            "total_is_estimate": {
                "type": "boolean",
                "description": "Whether `total` is estimated: above 1,000,000, or where counting takes more than 5 s.",
            },
        },
        "required": ["evaluations", "next"],
    },
    "Logged": {
        "type": "object",
        "properties": {
            "event_id": _UUID,
            "type": {"type": "string"},
            "attempt": _ATTEMPT,
            "occurred_at": _TIME,
            "recorded_at": _TIME,
            "extra": {"type": "object", "description": "Fields that this release does not know."},
        },
        "required": ["event_id", "type", "attempt", "occurred_at", "recorded_at"],
    },
    "Log": {
        "type": "object",
        "properties": {"events": {"type": "array", "items": ref("Logged")}, "next": _nullable({"type": "string"})},
        "required": ["events", "next"],
    },
    "Accepted": {
        "type": "object",
        "properties": {"eval_id": EVAL_ID, "event_id": _UUID, "status": {"const": "accepted"}},
        "required": ["eval_id", "event_id", "status"],
    },
    "Outcome": {
        "type": "object",
        "properties": {
            "line": {"type": "integer", "minimum": 1},
            "outcome": {"type": "string", "enum": _OUTCOMES},
            "eval_id": EVAL_ID,
            "event_id": _UUID,
            "faults": _FAULTS,
        },
        "required": ["line", "outcome"],
        "examples": [{"line": 1, "outcome": "applied", "eval_id": "run-1", "event_id": "0190a2f5-7a4c-7000-8000-000000000000"}],
    },
    **RUNS,
    **WEBHOOKS,
    **ANOMALIES,
    "Fault": {
        "type": "object",
        "properties": {"field": {"type": "string"}, "problem": {"type": "string"}},
        "required": ["field", "problem"],
    },
    "Problem": {
        "type": "object",
        "description": "RFC 9457.",
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "request_id": {"type": "string"},
            "faults": _FAULTS,
        },
        "required": ["type", "title", "status", "detail", "request_id"],
        "examples": [
            {
                "type": "urn:evalstore:problem:invalid",
                "title": "Unprocessable Entity",
                "status": 422,
                "detail": "exit_code: expected an integer, not str",
                "request_id": "5f0c7a53d2a84d7e8f2b6f0f7a3f8a11",
                "faults": [{"field": "exit_code", "problem": "expected an integer, not str"}],
            }
        ],
    },
}
