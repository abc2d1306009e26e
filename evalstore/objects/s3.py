"""An object store in a bucket of S3 or of a compatible server: `s3://bucket/prefix`."""

import base64
import hashlib
import io
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import reduce
from typing import Any, BinaryIO, TypeVar, cast

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from evalstore.objects import s3_answers
from evalstore.objects.directory import Probe
from evalstore.objects.file_part import FilePart
from evalstore.objects.frames import Encoder, Listed, Stream, is_key
from evalstore.objects.s3_conflicts import CONFLICT_ATTEMPTS, call_with_retries, wait_after_conflict
from models.content import FRAME_BYTES
from models.errors import ObjectDamaged, ObjectMissing, ObjectStoreOutage, ObjectUnavailable
from models.settings import Settings
from models.threads import in_threads

MULTIPART_BYTES = 16 * 1024 * 1024
PART_BYTES = 8 * 1024 * 1024
PARTS_AT_ONCE = 2

_READ_BYTES = 256 * 1024
# A deletion mark is valid for this time. A `touch` waits this long for the end of a deletion.
_MARK_S = 600
_DELETION_WAIT_S = 10
# A conflict over a key ends when the other request ends. All attempts together take about 3 s.

_T = TypeVar("_T")


class S3Store:
    """Objects below a prefix of a bucket. Safe for many threads; a process that forks needs its own."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        settings: Settings,
        *,
        threads: int = 8,
        attempts: int = 4,
        connect_timeout_s: float = 5,
        read_timeout_s: float = 30,
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self._endpoint_url = settings.s3_endpoint_url
        self._config = Config(
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=threads * PARTS_AT_ONCE,
            tcp_keepalive=True,
            # Writes have a checksum header, which more servers know than trailers. Reads are checked frame by frame.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # The signed headers contain a checksum of the body, so the body need not be signed.
            s3={"addressing_style": settings.s3_addressing_style, "payload_signing_enabled": False},
        )
        self._lacks_credentials = False
        with self._errors("open", ""):
            self._connect()
        options = {"StorageClass": settings.s3_storage_class, "ServerSideEncryption": settings.s3_server_side_encryption}
        self._write_options = {name: value for name, value in options.items() if value}
        # Features to use until the server refuses them.
        self._knows_conditions = self._knows_checksums = self._knows_suffixes = True

    def _connect(self) -> None:
        """Make the client, which looks for credentials now and never again."""
        session = boto3.session.Session()
        self._s3: Any = session.client("s3", endpoint_url=self._endpoint_url, config=self._config)
        self._lacks_credentials = False

    def open(self, key: str, start: int, stop: int | None = None) -> Stream:
        """Open stored bytes `start` to `stop`. A negative `start` counts from the end, at most to the beginning."""
        with self._errors("read", key):
            answer = self._tail(key, start) if start < 0 else self._get(key, start, stop)
            try:
                return self._stream(key, answer, start, stop)
            except BaseException:
                answer["Body"].close()
                raise

    def _tail(self, key: str, start: int) -> dict[str, Any]:
        """Request the last bytes. If the server does not support suffix ranges, request them by position."""
        if self._knows_suffixes:
            try:
                answer = self._get(key, start, None)
            except ClientError as error:
                if not s3_answers.is_unknown_range(error):
                    raise
            else:
                extent = s3_answers.extent(answer)
                if extent.size is None or extent.begin == max(0, extent.size + start):
                    return answer
                answer["Body"].close()  # it holds the whole object or its first bytes
        size = self._size(key)
        answer = self._get(key, max(0, size + start), size)
        self._knows_suffixes = False
        return answer

    def _stream(self, key: str, answer: dict[str, Any], start: int, stop: int | None) -> Stream:
        """Return the requested bytes of an answer, which holds more if the server does not know ranges."""
        extent = s3_answers.extent(answer)
        size = extent.size if extent.size is not None else self._size(key)
        begin = max(0, size + start) if start < 0 else start
        length = (size if stop is None else stop) - begin
        if length < 0 or begin + length > size:
            raise ObjectDamaged(f"{self._name(key)}: {size:,} bytes, fewer than its index says")
        if extent.begin > begin or (extent.length is not None and extent.begin + extent.length < begin + length):
            raise ObjectStoreOutage(f"{self._name(key)}: the server answered with another range than requested")
        listed = Listed(key, size, s3_answers.field(answer, "LastModified", self._name(key)))
        skip_bytes = begin - extent.begin
        body = s3_answers.Skipping(answer["Body"], skip_bytes) if skip_bytes else answer["Body"]
        return Stream(body, listed=listed, length=length, errors=self._errors)

    def _get(self, key: str, start: int, stop: int | None) -> dict[str, Any]:
        wanted = f"bytes={start}" if start < 0 else f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            answer = self._s3.get_object(**self._at(key), **({} if start == stop else {"Range": wanted}))
        except ClientError as error:
            if s3_answers.status(error) != 416:
                raise
            answer = self._s3.get_object(**self._at(key))  # an empty object has no ranges
        return cast("dict[str, Any]", answer)

    def _size(self, key: str) -> int:
        """Request the size of an object, for servers that do not send it with a range. Raises ObjectMissing."""
        try:
            answer = self._s3.head_object(**self._at(key))
        except ClientError as error:
            if s3_answers.status(error) != 404:
                raise
            # The answer to HEAD has no body, so it does not show whether the object or the bucket is missing.
            answer = self._s3.get_object(**self._at(key))
            answer["Body"].close()
        return int(s3_answers.field(answer, "ContentLength", self._name(key)))

    def write(self, encoder: Encoder, probe: Probe) -> bool:
        """Store the blocks of `encoder`, unless `probe` finds the object intact. Returns whether it was stored.

        The blocks wait in memory, or above 4 MiB in a temporary file, until the hash of the content is known.
        """
        if encoder.reference is not None and probe(encoder.reference) == "intact":
            return False
        with tempfile.SpooledTemporaryFile(max_size=FRAME_BYTES) as spool:
            for block in encoder:
                with self._errors("write a temporary file for", ""):
                    spool.write(block)
            reference, size = encoder.reference, spool.tell()
            if reference is None or (state := probe(reference)) == "intact":
                return False
            spool.flush()  # parts are read through the file descriptor
            with self._errors("write", reference.key):
                if not self._write_once(reference.key, cast("BinaryIO", spool), size, replace=state == "damaged"):
                    return False
            if state == "damaged":
                self._check_not_deleted(reference.key)
            return True

    def _write_once(self, key: str, spool: BinaryIO, size: int, *, replace: bool) -> bool:
        """Write, and repeat after conflicts over the key. Returns False if another process wrote the object.

        Raises ClientError. After a conflict, S3 requires that a multipart upload starts again:
        https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html
        """
        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                if size > MULTIPART_BYTES:
                    self._put_parts(key, spool.fileno(), size, replace=replace)
                else:
                    self._put(key, spool, replace=replace)
            except ClientError as error:
                if s3_answers.is_written_already(error):
                    return False
                if not s3_answers.is_conflict(error) or attempt + 1 == CONFLICT_ATTEMPTS:
                    raise
                if not replace and self._is_stored(key, size):  # perhaps by this upload, whose answer was lost
                    return False
                wait_after_conflict(attempt)
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _is_stored(self, key: str, size: int) -> bool:
        try:
            with self.open(key, -1) as stream:
                return stream.listed.size == size
        except ObjectMissing:
            return False

    def _check_not_deleted(self, key: str) -> None:
        """Raise ObjectUnavailable if a `delete` that checked the damaged object removes its replacement."""
        with self._errors("write", key):
            try:
                self._await_deletion(key)
            except ObjectMissing as error:
                raise ObjectUnavailable(f"{self._name(key)} was deleted while it was written") from error

    def _put(self, key: str, spool: BinaryIO, *, replace: bool) -> None:
        self._adapting(
            lambda: self._s3.put_object(
                **self._at(key), **self._headers(key), **self._checksum(spool), **self._condition(replace), Body=spool
            )
        )

    def _put_parts(self, key: str, spool: int, size: int, *, replace: bool) -> None:
        """Upload in parts, a few at a time in memory. After any error the upload is aborted."""
        created = self._adapting(
            lambda: self._s3.create_multipart_upload(
                **self._at(key),
                **self._headers(key),
                **({"ChecksumAlgorithm": "CRC32"} if self._knows_checksums else {}),
            )
        )
        upload = {**self._at(key), "UploadId": created["UploadId"]}

        def put_part(number: int) -> dict[str, Any]:
            part: Any = FilePart(spool, (number - 1) * PART_BYTES, min(number * PART_BYTES, size))
            answer = self._adapting(
                lambda: self._s3.upload_part(**upload, **self._checksum(part), PartNumber=number, Body=part)
            )
            checksum = {"ChecksumCRC32": answer["ChecksumCRC32"]} if "ChecksumCRC32" in answer else {}
            return {"PartNumber": number, "ETag": s3_answers.field(answer, "ETag", self._name(key)), **checksum}

        try:
            parts = in_threads(put_part, range(1, -(-size // PART_BYTES) + 1), PARTS_AT_ONCE)
            self._adapting(
                lambda: self._s3.complete_multipart_upload(
                    **upload, **self._condition(replace), MultipartUpload={"Parts": parts}
                )
            )
        except BaseException:
            with suppress(ClientError, BotoCoreError):  # `orphans` lists uploads that remain
                self._s3.abort_multipart_upload(**upload)
            raise

    def delete(self, key: str, unmodified_since: datetime | None = None) -> bool:
        """Delete the object, unless it was modified after `unmodified_since`. Returns whether it sent a deletion.

        S3 cannot check the time and delete in one request. So `delete` writes a mark, checks the time, deletes, and removes the
        mark. `touch` looks for the mark after its own write. Either `delete` sees the new time, or `touch` sees the mark.
        """
        with self._errors("delete", key):
            if unmodified_since is None:
                call_with_retries(lambda: self._s3.delete_object(**self._at(key)))
                return True
            started_at, mark = time.monotonic(), self._mark(key)
            empty = self._checksum(io.BytesIO())
            call_with_retries(lambda: self._adapting(lambda: self._s3.put_object(**mark, **empty, Body=b"")))
            try:
                with self.open(key, -1) as stream:
                    is_old = stream.listed.modified_at <= unmodified_since
                if is_old and time.monotonic() - started_at < _MARK_S / 2:
                    call_with_retries(lambda: self._s3.delete_object(**self._at(key)))
                    return True
            except ObjectMissing:
                pass
            finally:
                call_with_retries(lambda: self._s3.delete_object(**mark))
            return False

    def touch(self, key: str) -> None:
        """Set the object's time to now, by copying it onto itself. Raises ObjectMissing if a `delete` was faster."""
        with self._errors("touch", key):
            at = self._at(key)
            call_with_retries(
                lambda: self._s3.copy_object(**at, **self._headers(key), CopySource=at, MetadataDirective="REPLACE")
            )
            self._await_deletion(key)

    def _await_deletion(self, key: str) -> None:
        deadline = time.monotonic() + _DELETION_WAIT_S
        while self._is_being_deleted(key):
            if time.monotonic() > deadline:
                raise ObjectUnavailable(f"{self._name(key)} is being deleted")
            time.sleep(0.05)
        self.open(key, -1).__exit__()

    def _is_being_deleted(self, key: str) -> bool:
        try:
            answer = self._s3.head_object(**self._mark(key))
        except ClientError as error:
            if s3_answers.status(error) == 404:
                return False
            raise
        # Compare with the server's clock. An older mark is from a crashed process: a writer deletes only within half that time.
        date = s3_answers.field(answer["ResponseMetadata"]["HTTPHeaders"], "date", self._name(key))
        now = parsedate_to_datetime(date)
        return bool(now - answer["LastModified"] < timedelta(seconds=_MARK_S))

    def _mark(self, key: str) -> dict[str, str]:
        self._at(key)
        return {"Bucket": self.bucket, "Key": f"{self.prefix}deleting/{key}"}

    def objects(self, after: str = "") -> Iterator[Listed]:
        """List the objects with names after `after`, in order. Skips other objects."""
        pages = self._s3.get_paginator("list_objects_v2")
        with self._errors("list", ""):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix, StartAfter=self.prefix + after):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self.prefix)
                    if is_key(key):
                        yield Listed(key, entry["Size"], entry["LastModified"])

    def write_note(self, folder: str, name: str, text: bytes) -> None:
        """Write a small object that holds no content, such as a tombstone; one of that name stays as it is."""
        with self._errors("write", f"{folder}/{name}"):
            if self.read_note(folder, name) is None:
                body = io.BytesIO(text)
                self._adapting(
                    lambda: self._s3.put_object(
                        **self._note(folder, name), Body=body, **self._write_options, **self._checksum(body)
                    )
                )

    def read_note(self, folder: str, name: str) -> bytes | None:
        """Read a note, None where there is none."""
        with self._errors("read", f"{folder}/{name}"):
            try:
                answer = self._s3.get_object(**self._note(folder, name))
            except ClientError as error:
                if s3_answers.code(error) != "NoSuchKey":
                    raise
                return None
            with answer["Body"] as body:
                return bytes(body.read())

    def notes(self, folder: str) -> list[str]:
        """Return the names of all notes in a folder."""
        with self._errors("list", ""):
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{self.prefix}{folder}/")
            return [one["Key"].rpartition("/")[2] for page in pages for one in page.get("Contents", [])]

    def _note(self, folder: str, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}{folder}/{name}"}

    def orphans(self, before: datetime, *, remove: bool = False) -> list[str]:
        """List multipart uploads and deletion marks older than `before`, which crashes left behind.

        With `remove`, remove them.
        """
        names = []
        marks = self._s3.get_paginator("list_objects_v2")
        with self._errors("list", ""):
            for page in marks.paginate(Bucket=self.bucket, Prefix=f"{self.prefix}deleting/"):
                for entry in page.get("Contents", ()):
                    if entry["LastModified"] < before:
                        names.append(entry["Key"])
                        if remove:
                            self._s3.delete_object(Bucket=self.bucket, Key=entry["Key"])
        pages = self._s3.get_paginator("list_multipart_uploads")
        with self._errors("list", ""):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for upload in page.get("Uploads", ()):
                    if is_key(upload["Key"].removeprefix(self.prefix)) and upload["Initiated"] < before:
                        names.append(f"{upload['Key']} {upload['UploadId']}")
                        if remove:
                            self._s3.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return names

    def close(self) -> None:
        """Close the connections."""
        self._s3.close()

    def _at(self, key: str) -> dict[str, str]:
        if not is_key(key):
            raise ValueError(f"not the name of an object: {key!r}")
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _headers(self, key: str) -> dict[str, str]:
        return {
            "ContentType": "application/zstd" if key.endswith(".zst") else "application/octet-stream",
            **self._write_options,
        }

    def _name(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def _checksum(self, body: BinaryIO) -> dict[str, str]:
        """Compute the checksum that the server verifies: CRC-32, or MD5, which every server knows."""
        body.seek(0)
        pieces = iter(lambda: body.read(_READ_BYTES), b"")
        if self._knows_checksums:
            name, value = "ChecksumCRC32", reduce(lambda crc, piece: zlib.crc32(piece, crc), pieces, 0).to_bytes(4)
        else:
            md5 = hashlib.md5(usedforsecurity=False)
            for piece in pieces:
                md5.update(piece)
            name, value = "ContentMD5", md5.digest()
        body.seek(0)
        return {name: base64.b64encode(value).decode()}

    def _condition(self, replace: bool) -> dict[str, str]:
        return {"IfNoneMatch": "*"} if self._knows_conditions and not replace else {}

    def _adapting(self, call: Callable[[], _T]) -> _T:
        """Call, and repeat without conditions, then without CRC-32, if the server does not support them.

        S3 answers 501 then; other servers answer InvalidArgument: "Unsupported header ...".
        """
        while True:
            tried = self._knows_conditions, self._knows_checksums
            try:
                return call()
            except ClientError as error:
                details = error.response.get("Error", {})
                is_unsupported = details.get("Code") == "InvalidArgument" and "header" in str(details.get("Message")).lower()
                if not (s3_answers.status(error) == 501 or is_unsupported) or not any(tried):
                    raise
            if tried == (self._knows_conditions, self._knows_checksums):  # Otherwise another thread has changed them.
                if self._knows_conditions:
                    self._knows_conditions = False
                else:
                    self._knows_checksums = False

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        """Translate boto3's errors into ObjectMissing, ObjectUnavailable or ObjectStoreOutage."""
        try:
            if self._lacks_credentials:
                self._connect()
            yield
        except ClientError as error:
            raise s3_answers.translate(error, verb, self._name(key), is_object=bool(key)) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            self._lacks_credentials = isinstance(error, NoCredentialsError)
            raise ObjectStoreOutage(f"cannot {verb} {self._name(key)}: {error}") from error
