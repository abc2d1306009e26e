"""Answers of S3 servers that concern one object or one request, and servers that lack a part of the protocol."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from evalstore.objects import object_store
from evalstore.objects.existence_cache import ExistenceCache
from evalstore.objects.object_store import Reference, Stores
from evalstore.objects.s3 import S3Store
from models.content import FRAME_BYTES
from models.errors import ObjectDamaged, ObjectStoreOutage, ObjectUnavailable
from models.settings import Settings, settings
from tasks import uploads
from tests.integration.s3_relay import Fault, Request, S3Relay
from tests.integration.test_object_faults import is_end_of_parts, is_read, is_upload, read
from tests.seaweedfs import SeaweedFS

SMALL, OTHER = os.urandom(50_000), os.urandom(50_000)
LARGE = os.urandom(2 * FRAME_BYTES + 100)
PARTS = os.urandom(17 * 1024 * 1024)
CONFLICTS = [(409, "ConditionalRequestConflict"), (409, "OperationAborted"), (409, "")]
LATER = timedelta(hours=1)


@pytest.fixture
def relay(s3_server: SeaweedFS) -> Iterator[S3Relay]:
    with S3Relay(s3_server.port) as running:
        yield running


@pytest.fixture
def store(s3_url: str, relay: S3Relay) -> Iterator[S3Store]:
    bucket, prefix = s3_url.removeprefix("s3://").split("/")
    reached = S3Store(bucket, prefix, Settings(s3_endpoint_url=relay.endpoint), attempts=2)
    yield reached
    reached.close()


def reference_of(content: bytes, store: S3Store) -> Reference:
    return object_store.put(store, content).reference


@pytest.mark.parametrize("answer", CONFLICTS, ids=str)
def test_a_conflict_over_one_key_is_tried_again(store: S3Store, relay: S3Relay, answer: tuple[int, str]) -> None:
    relay.fail(is_upload, Fault("answer", answer), times=2)
    reference, new = object_store.put(store, SMALL)
    assert new
    relay.fail(lambda request: request.method in {"PUT", "DELETE"}, Fault("answer", answer), times=2)
    store.touch(reference.key)
    assert read(store, reference) == SMALL
    relay.fail(lambda request: request.method in {"PUT", "DELETE"}, Fault("answer", answer), times=2)
    assert store.delete(reference.key, unmodified_since=datetime.now(UTC) + LATER)


@pytest.mark.parametrize("answer", [*CONFLICTS, (404, "NoSuchUpload"), (400, "InvalidPart")], ids=str)
def test_an_upload_in_parts_that_meets_a_conflict_at_its_end_begins_anew(
    store: S3Store, relay: S3Relay, answer: tuple[int, str]
) -> None:
    relay.fail(is_end_of_parts, Fault("answer", answer), times=1)
    reference, new = object_store.put(store, PARTS)
    assert new
    begun = [request for request in relay.seen if request.method == "POST" and request.path.endswith("?uploads")]
    assert len(begun) == 2
    assert read(store, reference) == PARTS
    assert store.orphans(datetime.now(UTC) + LATER) == []


@pytest.mark.parametrize("answer", [(412, "PreconditionFailed"), (304, "")], ids=str)
def test_a_write_whose_condition_fails_found_the_same_object(store: S3Store, relay: S3Relay, answer: tuple[int, str]) -> None:
    relay.fail(is_upload, Fault("answer", answer), times=1)
    assert not object_store.put(store, SMALL).new


REFUSALS = [
    (409, "ConditionalRequestConflict"),
    (403, "AccessDenied"),
    (400, "RequestTimeout"),
    (400, "EntityTooSmall"),
    (400, "KMS.DisabledException"),
]


@pytest.mark.parametrize("answer", REFUSALS, ids=str)
def test_a_refusal_of_one_key_is_reported_for_it_alone_when_it_lasts(
    s3_url: str, relay: S3Relay, answer: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVALSTORE_OBJECT_STORE_URL", s3_url)
    monkeypatch.setenv("EVALSTORE_S3_ENDPOINT_URL", relay.endpoint)
    settings.cache_clear()
    try:
        sender = uploads.Uploader(settings())
        relay.fail(is_upload, Fault("answer", answer), times=20)
        with pytest.raises(ObjectUnavailable, match=answer[1]):
            sender.put(SMALL)
        relay.heal()
        assert sender.put(OTHER).size == len(OTHER)
        assert sender.put(SMALL).size == len(SMALL)
    finally:
        settings.cache_clear()


@pytest.mark.parametrize(
    "answer", [(403, "AccessDenied"), (403, "InvalidObjectState"), (400, "KMS.DisabledException")], ids=str
)
def test_an_object_that_cannot_be_read_leaves_the_others_readable(
    s3_url: str, relay: S3Relay, store: S3Store, answer: tuple[int, str]
) -> None:
    refused, good = reference_of(SMALL, store), reference_of(OTHER, store)
    relay.fail(lambda request: refused.key in request.path, Fault("answer", answer))
    presence = ExistenceCache(Stores(Settings(object_store_url=s3_url, s3_endpoint_url=relay.endpoint)))
    for _ in range(2):
        absent = presence.missing([refused, good])
        assert set(absent) == {refused}
        assert isinstance(absent[refused], ObjectUnavailable)
        assert presence.outage is None


@pytest.mark.parametrize(
    "answer", [(503, "SlowDown"), (429, "TooManyRequests"), (403, "InvalidAccessKeyId"), (404, "NoSuchBucket")], ids=str
)
def test_what_every_request_meets_is_an_outage_of_the_store(store: S3Store, relay: S3Relay, answer: tuple[int, str]) -> None:
    relay.fail(lambda _: True, Fault("answer", answer))
    with pytest.raises(ObjectStoreOutage) as raised:
        object_store.put(store, SMALL)
    assert not isinstance(raised.value, ObjectUnavailable)


def lacks_checksum(request: Request) -> bool:
    is_body = request.method == "PUT" and "x-amz-copy-source" not in request.headers
    return is_body and not {"content-md5", "x-amz-checksum-crc32"} & set(request.headers)


@pytest.mark.parametrize("content", [SMALL, PARTS], ids=len)
def test_a_bucket_with_object_lock_is_written_to_and_swept(store: S3Store, relay: S3Relay, content: bytes) -> None:
    """Such a bucket refuses each body without a checksum: "Content-MD5 OR x-amz-checksum- HTTP header is required"."""
    relay.fail(lacks_checksum, Fault("answer", (400, "InvalidRequest")))
    reference = reference_of(content, store)
    store.touch(reference.key)
    assert store.delete(reference.key, unmodified_since=datetime.now(UTC) + LATER)


def is_suffix(request: Request) -> bool:
    return request.headers.get("range", "").startswith("bytes=-")


@pytest.mark.parametrize("content", [b"", SMALL, LARGE], ids=len)
@pytest.mark.parametrize(
    "fault",
    [
        Fault("ignore", names=("range",)),
        Fault("answer", (400, "InvalidArgument")),
        Fault("answer", (501, "NotImplemented")),
    ],
    ids=str,
)
def test_a_server_without_suffix_ranges_is_asked_by_position(
    store: S3Store, relay: S3Relay, content: bytes, fault: Fault
) -> None:
    reference = reference_of(content, store)
    relay.fail(is_suffix, fault)
    check_reading(store, reference, content)
    relay.seen.clear()
    object_store.head(store, reference)
    if content:
        assert not any(is_suffix(request) for request in relay.seen)


@pytest.mark.parametrize("content", [b"", SMALL, LARGE], ids=len)
@pytest.mark.parametrize(
    "fault",
    [
        Fault("ignore", names=("range",)),
        Fault("strip", names=("content-length",)),
        Fault("strip", names=("etag",)),
    ],
    ids=str,
)
def test_content_is_read_from_a_server_without_ranges_or_lengths(
    store: S3Store, relay: S3Relay, content: bytes, fault: Fault
) -> None:
    reference = reference_of(content, store)
    relay.fail(is_read, fault)
    check_reading(store, reference, content)


def check_reading(store: S3Store, reference: Reference, content: bytes) -> None:
    assert read(store, reference) == content
    object_store.head(store, reference)
    object_store.verify(store, reference)
    for start, stop in ((0, len(content)), (len(content) // 2, len(content)), (len(content) // 3, len(content) // 2)):
        assert b"".join(object_store.read_range(store, reference, start, stop)) == content[start:stop]
    store.touch(reference.key)


def test_an_answer_without_a_time_is_an_error_that_says_so(store: S3Store, relay: S3Relay) -> None:
    reference = reference_of(SMALL, store)
    relay.fail(is_read, Fault("strip", names=("last-modified",)))
    with pytest.raises(ObjectStoreOutage, match="answers without LastModified"):
        object_store.head(store, reference)


def test_a_part_answered_without_an_etag_is_an_error_that_says_so(store: S3Store, relay: S3Relay) -> None:
    relay.fail(is_upload, Fault("strip", names=("etag",)))
    with pytest.raises(ObjectStoreOutage, match="answers without ETag"):
        object_store.put(store, PARTS)


def test_a_server_that_ignores_conditions_keeps_one_copy_of_the_content(store: S3Store, relay: S3Relay) -> None:
    relay.fail(is_upload, Fault("ignore", names=("if-none-match",)))
    reference = reference_of(SMALL, store)
    assert not object_store.put(store, SMALL).new
    assert read(store, reference) == SMALL


def test_an_object_shorter_than_its_index_says_is_damaged(store: S3Store) -> None:
    reference = reference_of(SMALL, store)
    with pytest.raises(ObjectDamaged, match="fewer than its index says"):
        store.open(reference.key, len(SMALL) * 2, len(SMALL) * 3)
