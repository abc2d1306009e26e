"""Archiving to S3 that is away, slow, or full of faults: done again or told of; nothing is lost, and nothing is ever wrong."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Connection

from evalstore.objects import object_store
from evalstore.objects.s3 import S3Store
from evalstore.storage import archive, database, event_store
from evalstore.storage.archive import Archive
from models.content import Reference
from models.events import parse
from models.settings import Settings
from tests.integration.s3_relay import Fault, Request, S3Relay
from tests.seaweedfs import SeaweedFS

OUTPUTS = {"small": os.urandom(200_000), "large": os.urandom(5 * 2**20)}


@pytest.fixture
def conn(database_url: str) -> Iterator[Connection]:
    engine = database.engine(database_url)
    with engine.connect() as conn:
        for eval_id, output in OUTPUTS.items():
            given = {"eval_id": eval_id, "event_id": uuid4(), "occurred_at": datetime.now(UTC).isoformat(), "exit_code": 0}
            event_store.store(conn, [parse({"type": "evaluation:completed", "output": output.decode("latin-1"), **given})])
        yield conn
    engine.dispose()


@pytest.fixture
def relay(s3_server: SeaweedFS) -> Iterator[S3Relay]:
    with S3Relay(s3_server.port) as running:
        yield running


@pytest.fixture
def settings(s3_url: str, s3_server: SeaweedFS) -> Settings:
    return Settings(object_store_url=s3_url, s3_endpoint_url=s3_server.endpoint, archive_threshold_bytes=100_000)


@pytest.fixture
def at(settings: Settings, relay: S3Relay) -> Iterator[Archive]:
    """The archive behind the relay, and not patient."""
    bucket, prefix = str(settings.object_store_url).removeprefix("s3://").split("/")
    store = S3Store(bucket, prefix, Settings(s3_endpoint_url=relay.endpoint), attempts=2, read_timeout_s=1.5)
    yield Archive.of(settings)._replace(store=store)
    store.close()


def is_upload(request: Request) -> bool:
    return request.method == "PUT"


def is_read(request: Request) -> bool:
    return request.method == "GET"


def contents(conn: Connection, settings: Settings) -> dict[str, bytes]:
    """What there is of each output: in the database, or in the archive, whose every byte is read past the relay."""
    with conn.begin():
        query = "SELECT eval_id, data, size, encode(sha256, 'hex'), encoding, store FROM contents"
        found = database.driver(conn).execute(query).fetchall()
    store = object_store.open_store(str(settings.object_store_url), settings)
    read = {
        eval_id: data if place is None else b"".join(object_store.read(store, Reference(sha256, size, encoding)))
        for eval_id, data, size, sha256, encoding, place in found
    }
    store.close()
    return read


EXPECTED = {eval_id: output.decode("latin-1").encode() for eval_id, output in OUTPUTS.items()}
FAULTS = [
    Fault("answer", (500, "InternalError")),
    Fault("answer", (503, "SlowDown")),
    Fault("hold"),
    Fault("reset"),
    Fault("lose the answer"),
    Fault("cut", 1000),
    Fault("spoil the answer", 1000),
    Fault("spoil the request"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_goes_wrong_is_done_again_or_told_of_and_the_other_copy_stays_until_all_is_right(
    conn: Connection, at: Archive, relay: S3Relay, settings: Settings, fault: Fault
) -> None:
    bodies = {"cut": [is_read], "spoil the answer": [is_read], "spoil the request": [is_upload]}
    for which in bodies.get(fault.action, [is_upload, is_read]):
        relay.fail(which, fault)
        failed = archive.run_once(conn, at, datetime.now(UTC))
        assert (failed.moved, failed.failed) == (0, 2)
        assert contents(conn, settings) == EXPECTED
        relay.heal()
        archive.retry_failed(conn, datetime.now(UTC))
    relay.fail(is_upload, fault, times=1)
    relay.fail(is_read, fault, times=1)

    archive.run_once(conn, at, datetime.now(UTC))
    archive.run_once(conn, at, datetime.now(UTC) + timedelta(hours=2))

    with conn.begin():
        assert database.driver(conn).execute("SELECT DISTINCT store, data FROM contents").fetchall() == [("objects", None)]
    assert contents(conn, settings) == EXPECTED
    assert len(list(at.store.objects())) == 2
