"""What the service's JSON looks like, for its OpenAPI document: schemas, examples, and the errors each answer may be."""

from typing import Any, Final

from models.content import MAX_CONTENT_BYTES
from models.plain import MAX_METADATA_BYTES

Schema = dict[str, Any]

EVAL_ID: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[A-Za-z0-9._~:@+=-]{1,200}$"}
STATUSES: Final = ("queued", "running", "completed", "failed", "timed_out", "cancelled", "lost")
ENDED: Final = ("running", "completed", "failed", "timed_out", "cancelled")
_INT64: Final[Schema] = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
_TIME: Final[Schema] = {"type": "string", "format": "date-time"}
_UUID: Final[Schema] = {"type": "string", "format": "uuid"}
_TEXT: Final[Schema] = {"type": "string", "maxLength": 1000}
_ATTEMPT: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 1_000_000}
_BASE64: Final = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
_METADATA: Final[Schema] = {"type": "object", "description": f"Up to {MAX_METADATA_BYTES // 1024} KiB of JSON."}


def ref(name: str) -> Schema:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _content(name: str) -> dict[str, Schema]:
    limit = f"Any string, up to {MAX_CONTENT_BYTES // 1024**2} MiB; comes back exactly."
    return {
        name: _nullable({"type": "string", "description": limit}),
        f"{name}_b64": _nullable(
            {"type": "string", "contentEncoding": "base64", "description": f"{name} as raw bytes, instead."}
        ),
        f"{name}_ref": _nullable({**ref("Reference"), "description": f"{name} that was uploaded before, instead."}),
    }


_GIVEN: Final[dict[str, Schema]] = {
    "event_id": _nullable(_UUID),
    "occurred_at": _nullable({**_TIME, "description": "With an offset; now, where it is missing."}),
    "attempt": _nullable(_ATTEMPT),
    "metadata": _nullable(_METADATA),
}
_QUEUED: Final[dict[str, Schema]] = {
    "run_id": _nullable({**EVAL_ID, "description": "The run it belongs to."}),
    "language": _nullable({**_TEXT, "description": "python, where it is missing."}),
    "submitter": _nullable(_TEXT),
    **_content("code"),
}
_CHANGED: Final[dict[str, Schema]] = {
    "executor_id": _nullable(_TEXT),
    "container_id": _nullable(_TEXT),
    "timeout_s": _nullable({"type": "number"}),
    "exit_code": _nullable(_INT64),
    "duration_ms": _nullable({"type": "number"}),
    "memory_bytes": _nullable(_INT64),
    "score": _nullable({"type": "number", "description": "What a grader gave."}),
    "reason": _nullable(_TEXT),
    **_content("output"),
    **_content("error"),
}
_STATE: Final[dict[str, Schema]] = {
    "eval_id": EVAL_ID,
    "status": {"type": "string", "enum": list(STATUSES)},
    "attempt": _ATTEMPT,
    "version": {"type": "integer", "minimum": 1, "description": "The number of its events; also the ETag."},
    "run_id": _nullable(EVAL_ID),
    **{name: _nullable(_TEXT) for name in ("language", "submitter", "executor_id", "container_id", "reason")},
    "exit_code": _nullable(_INT64),
    "duration_ms": _nullable({"type": "number"}),
    "memory_bytes": _nullable(_INT64),
    "score": _nullable({"type": "number"}),
    "timeout_s": _nullable({"type": "number"}),
    "metadata": {"type": "object"},
    **{name: _nullable(_TIME) for name in ("queued_at", "started_at", "finished_at")},
    "created_at": _TIME,
    "updated_at": _TIME,
}


def _shown(kind: str) -> dict[str, Schema]:
    return {
        kind: _nullable({"type": "string", "description": "Where it is text and up to 64 KiB."}),
        f"{kind}_b64": {"type": "string", "description": "Where it is not text, and up to 64 KiB."},
        f"{kind}_size": {"type": "integer", "minimum": 0, "description": "Bytes."},
        f"{kind}_preview": {"type": "string", "description": "The beginning of what is larger."},
        f"{kind}_url": {"type": "string", "description": "Where to read what is larger."},
    }


_CONTENTS: Final = {name: schema for kind in ("code", "output", "error") for name, schema in _shown(kind).items()}
_EVENT_TYPES: Final = [f"evaluation:{name}" for name in ("queued", "started", "running", *ENDED[1:])]
_OUTCOMES: Final = ["applied", "duplicate", "reused", "invalid", "accepted"]
_FAULTS: Final[Schema] = {"type": "array", "items": ref("Fault")}

SCHEMAS: Final[dict[str, Schema]] = {
    "NewEvaluation": {
        "type": "object",
        "description": "A queued event. `code` or `code_b64` is required.",
        "properties": {
            "type": {"const": "evaluation:queued"},
            "eval_id": EVAL_ID,
            **_GIVEN,
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
        "description": "Content that was uploaded, as POST /storage/content answers it.",
        "properties": {
            "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            "size": {"type": "integer", "minimum": 0, "description": "Bytes."},
            "encoding": {"type": "string", "enum": ["identity", "zstd"], "description": "How it is kept."},
        },
        "required": ["sha256", "size", "encoding"],
        "additionalProperties": False,
        "examples": [
            {"sha256": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", "size": 3, "encoding": "identity"}
        ],
    },
    "Change": {
        "type": "object",
        "description": "What happened next: a status, and the fields of the event that tells of it.",
        "properties": {
            "status": {"type": "string", "enum": ["queued", *ENDED]},
            "type": {"type": "string", "enum": _EVENT_TYPES, "description": "The event's type, instead of a status."},
            "eval_id": EVAL_ID,
            **_GIVEN,
            **_QUEUED,
            **_CHANGED,
        },
        "additionalProperties": False,
        "examples": [{"status": "completed", "exit_code": 0, "output": "1\n", "duration_ms": 12.5, "score": 0.75}],
    },
    "Event": {
        "type": "object",
        "description": "One fact about an evaluation; which field belongs to which type is in the reference of events.",
        "properties": {
            "type": {"type": "string", "enum": _EVENT_TYPES},
            "eval_id": EVAL_ID,
            **_GIVEN,
            **_QUEUED,
            **_CHANGED,
        },
        "required": ["type"],
        "additionalProperties": False,
        "examples": [{"type": "evaluation:started", "executor_id": "executor-1"}],
    },
    "Record": {
        "type": "object",
        "properties": {**_STATE, **_CONTENTS},
        "required": [*_STATE, "code", "output", "error"],
        "examples": [{"eval_id": "run-1", "status": "completed", "attempt": 1, "version": 3, "exit_code": 0, "output": "1\n"}],
    },
    "Written": {
        "type": "object",
        "description": "What a key that may not read is told of its writes.",
        "properties": {name: _STATE[name] for name in ("eval_id", "version", "status")},
        "required": ["eval_id", "version", "status"],
    },
    "Listed": {
        "type": "object",
        "description": "A record without its content.",
        "properties": _STATE,
        "required": list(_STATE),
    },
    "Page": {
        "type": "object",
        "properties": {
            "evaluations": {"type": "array", "items": ref("Listed")},
            "next": _nullable({"type": "string", "description": "The cursor of the next page; null at the end."}),
            "total": _nullable(
                {
                    "type": "integer",
                    "description": "With total=true: how many match, counted up to 1,000,000; null where that takes too long.",
                }
            ),
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
            "extra": {"type": "object", "description": "Fields this release does not know."},
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
