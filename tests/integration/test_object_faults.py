"""S3 that is away, slow, full of faults or set up wrongly: retried or reported, never lost, never wrong."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evalstore.local.servers import free_port
from evalstore.objects import object_store
from evalstore.objects.object_store import Reference, Stores
from evalstore.objects.s3 import S3Store
from models.content import FRAME_BYTES
from models.errors import ObjectDamaged, ObjectStoreOutage
from models.settings import Settings
from tests.integration.s3_relay import Fault, Request, S3Relay
from tests.seaweedfs import SeaweedFS

MIB = 1024 * 1024
SMALL = os.urandom(50_000)
LARGE = os.urandom(3 * FRAME_BYTES)
PARTS = os.urandom(20 * MIB)
LATER = timedelta(hours=1)


@pytest.fixture
def relay(s3_server: SeaweedFS) -> Iterator[S3Relay]:
    with S3Relay(s3_server.port) as running:
        yield running


@pytest.fixture
def store(s3_url: str, relay: S3Relay, request: pytest.FixtureRequest) -> Iterator[S3Store]:
    """What goes through the relay; where that holds something back, it is not patient."""
    bucket, prefix = s3_url.removeprefix("s3://").split("/")
    patience_s = 1.5 if "hold" in request.node.name else 30
    reached = S3Store(bucket, prefix, Settings(s3_endpoint_url=relay.endpoint), attempts=2, read_timeout_s=patience_s)
    yield reached
    reached.close()


@pytest.fixture
def behind(s3_url: str, s3_server: SeaweedFS) -> S3Store:
    """The same without the relay."""
    bucket, prefix = s3_url.removeprefix("s3://").split("/")
    return S3Store(bucket, prefix, Settings(s3_endpoint_url=s3_server.endpoint))


def read(store: object_store.Store, reference: Reference) -> bytes:
    return b"".join(object_store.read(store, reference))


def is_upload(request: Request) -> bool:
    return request.method == "PUT"


def is_end_of_parts(request: Request) -> bool:
    return request.method == "POST" and "uploadId=" in request.path


def is_read(request: Request) -> bool:
    return request.method == "GET" and "list-type" not in request.path


def is_second_read(store: S3Store) -> Callable[[Request], bool]:
    """Of content of several frames: the index comes first, and then the frames."""
    return lambda request: is_read(request) and not request.headers["range"].startswith("bytes=-")


FAULTS = [
    Fault("answer", (500, "InternalError")),
    Fault("answer", (503, "SlowDown")),
    Fault("answer", (429, "TooManyRequests")),
    Fault("hold"),
    Fault("reset"),
    Fault("lose the answer"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("content", [SMALL, PARTS], ids=["small", "in parts"])
def test_a_request_that_fails_once_is_repeated(store: S3Store, relay: S3Relay, content: bytes, fault: Fault) -> None:
    for which in (is_upload, is_read, is_end_of_parts):
        relay.fail(which, fault, times=1)
    try:
        reference, _ = object_store.put(store, content)
    except ObjectStoreOutage:  # The server completed the upload, and the first answer was lost: repeat the step.
        assert fault.action in {"lose the answer", "hold"}
        reference, _ = object_store.put(store, content)
    relay.fail(is_read, fault, times=1)
    assert read(store, reference) == content
    assert len(list(store.objects())) == 1
    assert store.orphans(datetime.now(UTC) + LATER) == []


@pytest.mark.parametrize("fault", FAULTS[:5], ids=str)
@pytest.mark.parametrize("content", [SMALL, PARTS], ids=["small", "in parts"])
def test_what_stays_away_is_an_outage_that_leaves_nothing_behind(
    store: S3Store, behind: S3Store, relay: S3Relay, content: bytes, fault: Fault
) -> None:
    relay.fail(is_upload, fault)
    with pytest.raises(ObjectStoreOutage):
        object_store.put(store, content)
    relay.heal()
    assert list(behind.objects()) == []
    assert behind.orphans(datetime.now(UTC) + LATER) == []
    reference, new = object_store.put(store, content)
    assert new
    relay.fail(is_read, fault)
    for act in (object_store.head, object_store.read, object_store.verify):
        with pytest.raises(ObjectStoreOutage):
            act(store, reference)
    relay.heal()
    assert read(store, reference) == content


def test_a_server_that_is_gone_is_an_outage_until_it_is_back(s3_url: str, s3_server: SeaweedFS) -> None:
    with S3Relay(s3_server.port) as gone:
        pass
    bucket, prefix = s3_url.removeprefix("s3://").split("/")
    nobody = S3Store(bucket, prefix, Settings(s3_endpoint_url=gone.endpoint), attempts=2)
    for act in (
        lambda: object_store.put(nobody, SMALL),
        lambda: object_store.head(nobody, Reference("0" * 64, 5, "identity")),
        lambda: nobody.delete("0" * 64),
        lambda: nobody.touch("0" * 64),
        lambda: list(nobody.objects()),
        lambda: nobody.orphans(datetime.now(UTC)),
    ):
        with pytest.raises(ObjectStoreOutage, match="cannot"):
            act()


@pytest.mark.parametrize("at", [0, 5, FRAME_BYTES + 70_000])
def test_a_body_cut_short_is_read_on_from_where_it_broke_off(store: S3Store, relay: S3Relay, at: int) -> None:
    reference, _ = object_store.put(store, LARGE)
    relay.fail(is_second_read(store), Fault("cut", at), times=2)
    assert read(store, reference) == LARGE
    reference, _ = object_store.put(store, SMALL)
    relay.fail(is_read, Fault("cut", 3), times=2)
    assert read(store, reference) == SMALL


def test_a_body_that_is_cut_short_every_time_is_an_outage_after_what_was_right(store: S3Store, relay: S3Relay) -> None:
    reference, _ = object_store.put(store, LARGE)
    relay.fail(is_second_read(store), Fault("cut", 5))
    got: list[bytes] = []
    with pytest.raises(ObjectStoreOutage):
        got.extend(object_store.read(store, reference))
    assert got == []


@pytest.mark.parametrize(("content", "at"), [(SMALL, 7), (SMALL, -1), (LARGE, FRAME_BYTES + 7), (LARGE, -1)])
def test_wrong_bytes_on_the_way_are_asked_for_again(store: S3Store, relay: S3Relay, content: bytes, at: int) -> None:
    reference, _ = object_store.put(store, content)
    relay.fail(
        lambda r: is_read(r) and (len(content) == len(SMALL) or "-" in r.path or is_second_read(store)(r)),
        Fault("spoil the answer", at),
        1,
    )
    assert read(store, reference) == content
    relay.fail(is_read, Fault("spoil the answer", -1), times=1)  # the end of the index
    assert read(store, reference) == content


def test_wrong_bytes_every_time_are_damage_after_what_was_right(store: S3Store, relay: S3Relay) -> None:
    reference, _ = object_store.put(store, LARGE)
    relay.fail(is_second_read(store), Fault("spoil the answer", -1))
    got: list[bytes] = []
    with pytest.raises(ObjectDamaged, match="frame 2"):
        got.extend(object_store.read(store, reference))
    assert b"".join(got) == LARGE[: 2 * FRAME_BYTES]


@pytest.mark.parametrize("content", [SMALL, PARTS], ids=["small", "in parts"])
def test_bytes_that_arrive_wrong_are_not_stored(store: S3Store, behind: S3Store, relay: S3Relay, content: bytes) -> None:
    relay.fail(is_upload, Fault("spoil the request"))
    with pytest.raises(ObjectStoreOutage):
        object_store.put(store, content)
    assert list(behind.objects()) == []
    assert behind.orphans(datetime.now(UTC) + LATER) == []


def test_an_upload_that_broke_off_and_could_not_be_given_up_is_found_and_removed(store: S3Store, relay: S3Relay) -> None:
    relay.fail(lambda request: is_upload(request) or request.method == "DELETE", Fault("reset"))
    with pytest.raises(ObjectStoreOutage):
        object_store.put(store, PARTS)
    relay.heal()
    now = datetime.now(UTC)
    assert store.orphans(now - LATER, remove=True) == []
    assert len(store.orphans(now + LATER)) == 1
    assert len(store.orphans(now + LATER, remove=True)) == 1
    assert store.orphans(now + LATER) == []


@pytest.mark.parametrize("content", [SMALL, PARTS], ids=["small", "in parts"])
@pytest.mark.parametrize("header", ["if-none-match", "x-amz-checksum-crc32"])
@pytest.mark.parametrize("answer", [(501, "NotImplemented"), (400, "InvalidArgument")], ids=str)
def test_a_server_that_lacks_conditions_or_checksums_is_written_to_without(
    store: S3Store, relay: S3Relay, header: str, content: bytes, answer: tuple[int, str]
) -> None:
    relay.fail(lambda request: header in request.headers, Fault("answer", answer))
    reference, new = object_store.put(store, content)
    assert new
    assert read(store, reference) == content
    if header.startswith("x-amz"):
        assert any("content-md5" in request.headers for request in relay.seen)


class MetadataService:
    """Serve the credentials of a role as the metadata service of an EC2 machine does."""

    def __init__(self, port: int, key: str, secret: str) -> None:
        found = {"Code": "Success", "AccessKeyId": key, "SecretAccessKey": secret, "Token": ""}
        found["Expiration"] = "2099-01-01T00:00:00Z"

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                text = json.dumps(found) if self.path.endswith("/role") else "role"
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_PUT = answer  # noqa: N815  names of http.server

            def log_message(self, *_: object) -> None:
                """Tests tell what matters."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def test_credentials_that_come_after_the_start_are_used(
    s3_server: SeaweedFS, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may start before its machine's metadata service answers."""
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    port = free_port()
    changes = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nonexistent"}
    changes |= {"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{port}/"}
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    stores = Stores(Settings(object_store_url=s3_url, s3_endpoint_url=s3_server.endpoint))
    with pytest.raises(ObjectStoreOutage, match="credentials"):
        object_store.put(stores["objects"], b"some")
    service = MetadataService(port, key, secret)
    try:
        assert object_store.put(stores["objects"], b"some").new
    finally:
        stores.close()
        service.server.shutdown()
        service.server.server_close()


@pytest.mark.parametrize(
    ("bucket", "environment", "message"),
    [
        ("nobody-made-this", {}, "create the bucket"),
        ("evalstore", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        ("evalstore", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nonexistent"}, "credentials"),
    ],
)
def test_what_an_operator_has_to_mend_is_an_outage_that_says_so(
    bucket: str, environment: dict[str, str], message: str, s3_url: str, s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = S3Store(bucket, "x", Settings(s3_endpoint_url=s3_server.endpoint))
    for act in (
        lambda: object_store.put(store, SMALL),
        lambda: object_store.head(store, Reference("0" * 64, 5, "identity")),
        lambda: store.delete("0" * 64, unmodified_since=datetime.now(UTC)),
        lambda: list(store.objects()),
    ):
        with pytest.raises(ObjectStoreOutage, match=message):
            act()


def test_storage_class_and_encryption_are_asked_for_and_outlast_a_touch(s3_url: str, s3_server: SeaweedFS) -> None:
    settings = Settings(s3_endpoint_url=s3_server.endpoint, s3_storage_class="STANDARD_IA", s3_server_side_encryption="AES256")
    store, client = object_store.open_store(s3_url, settings), s3_server.client()
    for content in (SMALL, PARTS):
        reference, _ = object_store.put(store, content)
        store.touch(reference.key)
        found = client.head_object(Bucket=s3_server.bucket, Key=f"{s3_url.rpartition('/')[2]}/{reference.key}")
        assert (found["StorageClass"], found["ServerSideEncryption"]) == ("STANDARD_IA", "AES256")
        assert read(store, reference) == content


def test_virtual_hosts_are_used_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    for style, address in (("virtual", "http://bucket.s3.test:1/k"), ("path", "http://s3.test:1/bucket/k")):
        settings = Settings.from_environment(
            {"EVALSTORE_S3_ENDPOINT_URL": "http://s3.test:1", "EVALSTORE_S3_ADDRESSING_STYLE": style}
        )
        store = S3Store("bucket", "", settings)
        assert store._s3.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"}).startswith(address)
