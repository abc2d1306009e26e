"""Content comes back as it was wherever it is: by the service, by the command and from Python; or an error says why not."""

import base64
import json
import os
import random
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Engine

from evalstore.objects import object_store
from evalstore.objects.object_store import Stores
from evalstore.storage import content_reader, event_store
from models.content import FRAME_BYTES
from models.errors import ObjectDamaged, ObjectMissing
from models.events import parse
from models.settings import Settings
from tests.integration.commands import python

ROOT = Path(__file__).parents[2]
E = "/storage/evaluations"
SMALL = "é😀 and so on\n".encode() * 500
LARGE = os.urandom(FRAME_BYTES) + b"text\n" * FRAME_BYTES
Json = dict[str, Any]


@pytest.fixture(params=["file", "s3"])
def given(request: Any, tmp_path: Path, database_url: str) -> Json:
    """The settings of whoever reads."""
    found = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_OBJECT_STORE_URL": f"file://{tmp_path}/objects"}
    if request.param == "s3":
        found["EVALSTORE_OBJECT_STORE_URL"] = request.getfixturevalue("s3_url")
        found["EVALSTORE_S3_ENDPOINT_URL"] = request.getfixturevalue("s3_server").endpoint
    return found


@pytest.fixture
def stores(given: Json) -> Stores:
    return Stores(Settings.from_environment(given))


def store(engine: Engine, eval_id: str, **fields: Any) -> None:
    event = {"type": "evaluation:completed", "eval_id": eval_id, "exit_code": 0, "event_id": UUID(int=1)}
    with engine.connect() as conn:
        event_store.store(conn, [parse({**event, "occurred_at": "2026-01-01T00:00:00Z", **fields})])


@pytest.fixture
def stored(engine: Engine, stores: Stores) -> None:
    """`inline` and `objects`: the same content, in the database and in the object store."""
    store(engine, "inline", output_b64=base64.b64encode(LARGE).decode(), error_b64=base64.b64encode(SMALL).decode())
    output, error = (object_store.put(stores["objects"], data).reference for data in (LARGE, SMALL))
    store(engine, "objects", output_ref=output, error_ref=error)


def get(given: Json, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [*python(), "-m", "evalstore.cli.app", "get", *arguments]
    return subprocess.run(command, check=False, capture_output=True, cwd=ROOT, timeout=120, env={**os.environ, **given})


@pytest.mark.usefixtures("stored")
def test_the_same_comes_back_by_every_way(given: Json, engine: Engine, stores: Stores, start_api: Callable[..., Any]) -> None:
    api = start_api(**given)
    with engine.connect() as conn:
        inline, referring = (event_store.get(conn, eval_id, stores) for eval_id in ("inline", "objects"))
    assert inline
    assert referring
    assert (referring.output, referring.error) == (inline.output, inline.error) == (LARGE, SMALL.decode())

    assert get(given, "objects", "--output").stdout == LARGE
    assert get(given, "objects", "--error").stdout == SMALL
    shown = [json.loads(get(given, eval_id, "-o", "json").stdout) for eval_id in ("inline", "objects")]
    answered = [api.read.get(f"{E}/{eval_id}").json() for eval_id in ("inline", "objects")]
    for one, other in (shown, answered):
        assert {name for name in one if one[name] != other[name]} <= {"eval_id", "created_at", "updated_at", "output_url"}
        assert other["output_size"] == len(LARGE)
        assert other["error"] == SMALL.decode()

    spans = [(0, 0), (FRAME_BYTES - 1, FRAME_BYTES), (len(LARGE) - 1, len(LARGE) - 1)]
    picked = random.Random(1)  # noqa: S311 - the same at every run
    spans += [(first, first + picked.randrange(3_000_000)) for first in (picked.randrange(len(LARGE)) for _ in range(5))]
    for kind, data in (("output", LARGE), ("error", SMALL)):
        answers = [api.read.get(f"{E}/{eval_id}/{kind}") for eval_id in ("inline", "objects")]
        assert all(answer.content == data for answer in answers)
        compared = [
            {
                name: value
                for name, value in answer.headers.items()
                if name.startswith(("content-type", "repr-", "content-length"))
            }
            for answer in answers
        ]
        assert compared[0] | {"repr-digest": ""} == compared[1] | {"repr-digest": ""}
    for first, last in spans:
        part = api.read.get(f"{E}/objects/output", headers={"Range": f"bytes={first}-{last}"})
        assert (part.status_code, part.content) == (206, LARGE[first : last + 1])
    assert api.read.get(f"{E}/objects/output", headers={"Range": "bytes=-5"}).headers["content-type"].startswith("application/")


def damage(given: Json, key: str) -> None:
    """Change a byte in the middle of an object."""
    place = given["EVALSTORE_OBJECT_STORE_URL"]
    if place.startswith("file://"):
        path = Path(place.removeprefix("file://"), key[:2], key[2:4], key)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return
    store: Any = Stores(Settings.from_environment(given))["objects"]
    where = {"Bucket": store.bucket, "Key": store.prefix + key}
    data = bytearray(store._s3.get_object(**where)["Body"].read())
    data[len(data) // 2] ^= 1
    store._s3.put_object(**where, Body=bytes(data))


@pytest.mark.usefixtures("stored")
def test_a_damaged_or_missing_object_is_an_error_and_never_wrong_bytes(
    given: Json, engine: Engine, stores: Stores, start_api: Callable[..., Any]
) -> None:
    api = start_api(**given)
    connect = engine.connect
    with connect() as conn:
        output, error = (content_reader.find(conn, "objects", kind) for kind in ("output", "error"))
    assert output
    assert error
    for content in (output, error):
        damage(given, content.reference.key)
    got: list[bytes] = []
    with pytest.raises(ObjectDamaged, match=output.reference.key):
        got.extend(content_reader.read(connect, stores, output))
    assert LARGE.startswith(b"".join(got))
    with pytest.raises(ObjectDamaged), connect() as conn:
        event_store.get(conn, "objects", stores)
    said = get(given, "objects", "--output")
    assert said.returncode == 1
    assert b"ObjectDamaged" in said.stderr
    assert LARGE.startswith(said.stdout)
    answer = api.read.get(f"{E}/objects/error")
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:evalstore:problem:object-damaged")
    record = api.read.get(f"{E}/objects").json()
    assert (record["error_size"], record["error_url"]) == (len(SMALL), f"{E}/objects/error")
    stores["objects"].delete(error.reference.key)
    with pytest.raises(ObjectMissing, match=error.reference.key):
        list(content_reader.read(connect, stores, error))
    assert api.read.get(f"{E}/objects/error").json()["type"] == "urn:evalstore:problem:object-missing"
    assert get(given, "objects", "-o", "json").returncode == 0


@pytest.mark.usefixtures("stored")
def test_content_that_moves_while_it_is_read_is_read_on_from_there(engine: Engine, stores: Stores, database_url: str) -> None:
    with engine.connect() as conn:
        inline, referring = (content_reader.find(conn, eval_id, "output") for eval_id in ("inline", "objects"))
    assert inline
    assert referring
    pieces = content_reader.read(engine.connect, stores, inline)
    got = [next(pieces)]
    with psycopg.connect(database_url, autocommit=True) as plain:
        archived = "UPDATE contents SET store = 'objects', encoding = 'zstd', data = NULL WHERE eval_id = 'inline'"
        plain.execute(archived)
        got += pieces
        assert b"".join(got) == LARGE
        # Looked up before the move. Then moved back and forth.
        assert b"".join(content_reader.read(engine.connect, stores, inline, 7, FRAME_BYTES + 9)) == LARGE[7 : FRAME_BYTES + 9]
        stores["objects"].delete(referring.reference.key)
        plain.execute("UPDATE contents SET store = NULL, encoding = NULL, data = %s WHERE kind = 'output'", [LARGE])
        assert b"".join(content_reader.read(engine.connect, stores, referring)) == LARGE
        plain.execute("DELETE FROM evaluation_events")
        with pytest.raises(LookupError):
            list(content_reader.read(engine.connect, stores, referring))


def test_damaged_content_in_the_database_is_reported_too(engine: Engine, stores: Stores, database_url: str) -> None:
    store(engine, "e", output="x" * 5_000_000)
    with psycopg.connect(database_url) as plain:
        plain.execute("UPDATE contents SET data = overlay(data PLACING 'y' FROM 2500000)")
    with engine.connect() as conn:
        found = content_reader.find(conn, "e", "output")
        assert found
        with pytest.raises(ObjectDamaged, match="has SHA-256"):
            b"".join(content_reader.read(lambda: nullcontext(conn), stores, found))


@pytest.mark.parametrize("given", ["file"], indirect=True)
@pytest.mark.usefixtures("stored")
def test_while_the_object_store_is_away_records_are_shown_without_what_is_there(
    given: Json, tmp_path: Path, start_api: Callable[..., Any], eventually: Callable[..., None]
) -> None:
    (tmp_path / "objects").rename(tmp_path / "away")
    api = start_api(**given)
    answer = api.read.get(f"{E}/objects")
    assert (answer.status_code, answer.json()["error_size"]) == (200, len(SMALL))
    for kind in ("output", "error"):
        assert api.read.get(f"{E}/objects/{kind}").status_code == 503
    said = get(given, "objects", "-o", "json")
    assert (said.returncode, json.loads(said.stdout)["error_size"]) == (0, len(SMALL))
    assert b"shown without" in said.stderr
    assert get(given, "objects", "--error").returncode == 7
    (tmp_path / "away").rename(tmp_path / "objects")  # No cache keeps the record without its content.
    eventually(lambda: api.read.get(f"{E}/objects").json()["error"] == SMALL.decode(), within_s=20)
