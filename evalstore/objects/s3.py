"""The object store in a bucket of S3, or of a server that speaks its protocol: `s3://bucket/prefix`."""

import base64
import hashlib
import io
import os
import random
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
from evalstore.objects.directory import Look
from evalstore.objects.frames import Encoder, Listed, Stream, is_key
from models.content import FRAME_BYTES
from models.errors import ObjectDamaged, ObjectMissing, ObjectStoreOutage, ObjectUnavailable
from models.settings import Settings
from models.threads import in_threads

MULTIPART_BYTES = 16 * 1024 * 1024
PART_BYTES = 8 * 1024 * 1024
PARTS_AT_ONCE = 2

_READ_BYTES = 256 * 1024
# For how long at most a mark says that an object is being deleted, and how long a `touch` waits for the end of that.
_MARK_S = 600
_PATIENCE_S = 10
# A conflict over one key ends with the other request: about 3 s for all attempts, however many processes meet there.
_CONFLICT_ATTEMPTS = 6
_CONFLICT_WAIT_S = 0.1

_T = TypeVar("_T")


class S3Store:
    """Objects below a prefix of a bucket. Threads may share it; a process that forks opens it anew."""

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
            # What is sent has a checksum in its headers, which more servers know than trailers; what is read is checked
            # frame by frame.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # The checksum in the signed headers vouches for the body: it need not be hashed once more to be signed itself.
            s3={"addressing_style": settings.s3_addressing_style, "payload_signing_enabled": False},
        )
        self._lacks_credentials = False
        with self._errors("open", ""):
            self._connect()
        kept = {"StorageClass": settings.s3_storage_class, "ServerSideEncryption": settings.s3_server_side_encryption}
        self._kept = {name: value for name, value in kept.items() if value}
        # Until the server answers that it knows no such thing.
        self._knows_conditions = self._knows_checksums = self._knows_suffixes = True

    def _connect(self) -> None:
        """Make the client, which looks for credentials now and never again."""
        session = boto3.session.Session()
        self._s3: Any = session.client("s3", endpoint_url=self._endpoint_url, config=self._config)
        self._lacks_credentials = False

    def open(self, key: str, start: int, stop: int | None = None) -> Stream:
        """Bytes `start` to `stop` as stored, or for a negative start that many at the end, or all there are."""
        with self._errors("read", key):
            answer = self._tail(key, start) if start < 0 else self._get(key, start, stop)
            try:
                return self._stream(key, answer, start, stop)
            except BaseException:
                answer["Body"].close()
                raise

    def _tail(self, key: str, start: int) -> dict[str, Any]:
        """Ask for the last bytes; of a server that does not know this form of a range, by their position."""
        if self._knows_suffixes:
            try:
                answer = self._get(key, start, None)
            except ClientError as error:
                if not s3_answers.is_unknown_range(error):
                    raise
            else:
                found = s3_answers.extent(answer)
                if found.size is None or found.begin == max(0, found.size + start):
                    return answer
                answer["Body"].close()  # it holds all, or the first bytes
        size = self._size(key)
        answer = self._get(key, max(0, size + start), size)
        self._knows_suffixes = False
        return answer

    def _stream(self, key: str, answer: dict[str, Any], start: int, stop: int | None) -> Stream:
        """The bytes that were asked for, out of an answer that may hold more: some servers do not know ranges."""
        found = s3_answers.extent(answer)
        size = found.size if found.size is not None else self._size(key)
        begin = max(0, size + start) if start < 0 else start
        length = (size if stop is None else stop) - begin
        if length < 0 or begin + length > size:
            raise ObjectDamaged(f"{self._name(key)}: {size:,} bytes, its index says more")
        if found.begin > begin or (found.length is not None and found.begin + found.length < begin + length):
            raise ObjectStoreOutage(f"{self._name(key)}: the server answers with another part than it was asked for")
        listed = Listed(key, size, s3_answers.field(answer, "LastModified", self._name(key)))
        skip_bytes = begin - found.begin
        body = s3_answers.Skipping(answer["Body"], skip_bytes) if skip_bytes else answer["Body"]
        return Stream(body, listed=listed, length=length, errors=self._errors)

    def _get(self, key: str, start: int, stop: int | None) -> dict[str, Any]:
        wanted = f"bytes={start}" if start < 0 else f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            answer = self._s3.get_object(**self._at(key), **({} if start == stop else {"Range": wanted}))
        except ClientError as error:
            if s3_answers.status(error) != 416:
                raise
            answer = self._s3.get_object(**self._at(key))  # it is empty, so that no part of it can be asked for
        return cast("dict[str, Any]", answer)

    def _size(self, key: str) -> int:
        """The size of an object, from a server that does not say it with the object. Raises ObjectMissing."""
        try:
            answer = self._s3.head_object(**self._at(key))
        except ClientError as error:
            if s3_answers.status(error) != 404:
                raise
            # An answer to HEAD has no body that says whether the object or the bucket is missing.
            answer = self._s3.get_object(**self._at(key))
            answer["Body"].close()
        return int(s3_answers.field(answer, "ContentLength", self._name(key)))

    def write(self, encoder: Encoder, look: Look) -> bool:
        """Store what `encoder` yields, unless `look` says, once its name is known, that it is there; whether it was stored.

        The name is the hash of all of it: until that is known it waits in memory, or above 4 MiB in a temporary file.
        """
        if encoder.reference is not None and look(encoder.reference) == "intact":
            return False
        with tempfile.SpooledTemporaryFile(max_size=FRAME_BYTES) as spool:
            for block in encoder:
                with self._errors("keep in a temporary file what goes to", ""):
                    spool.write(block)
            reference, size = encoder.reference, spool.tell()
            if reference is None or (found := look(reference)) == "intact":
                return False
            spool.flush()  # parts are read from the file beside it
            with self._errors("write", reference.key):
                if not self._write_once(reference.key, cast("BinaryIO", spool), size, replace=found == "damaged"):
                    return False
            if found == "damaged":
                self._verify_kept(reference.key)
            return True

    def _write_once(self, key: str, spool: BinaryIO, size: int, *, replace: bool) -> bool:
        """Write, again after conflicts over this key; False if another wrote the same meanwhile. Raises ClientError.

        S3 asks for an upload in parts to begin anew then: https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html
        """
        for attempt in range(_CONFLICT_ATTEMPTS):
            try:
                if size > MULTIPART_BYTES:
                    self._put_parts(key, spool.fileno(), size, replace=replace)
                else:
                    self._put(key, spool, replace=replace)
            except ClientError as error:
                if s3_answers.is_written_already(error):
                    return False
                if not s3_answers.is_conflict(error) or attempt + 1 == _CONFLICT_ATTEMPTS:
                    raise
                if not replace and self._is_stored(key, size):  # such as by this upload, whose answer was lost
                    return False
                _wait_after_conflict(attempt)
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _is_stored(self, key: str, size: int) -> bool:
        try:
            with self.open(key, -1) as stream:
                return stream.listed.size == size
        except ObjectMissing:
            return False

    def _verify_kept(self, key: str) -> None:
        """A `delete` that looked at what was there before would take what replaced it."""
        with self._errors("write", key):
            try:
                self._outlast_deletion(key)
            except ObjectMissing as error:
                raise ObjectUnavailable(f"{self._name(key)} was deleted while it was written") from error

    def _put(self, key: str, spool: BinaryIO, *, replace: bool) -> None:
        self._adapting(
            lambda: self._s3.put_object(
                **self._at(key), **self._as(key), **self._checksum(spool), **self._condition(replace), Body=spool
            )
        )

    def _put_parts(self, key: str, spool: int, size: int, *, replace: bool) -> None:
        """In parts, of which a few are in memory at once. Whatever fails, the parts are given up."""
        created = self._adapting(
            lambda: self._s3.create_multipart_upload(
                **self._at(key),
                **self._as(key),
                **({"ChecksumAlgorithm": "CRC32"} if self._knows_checksums else {}),
            )
        )
        upload = {**self._at(key), "UploadId": created["UploadId"]}

        def put_part(number: int) -> dict[str, Any]:
            part: Any = _Part(spool, (number - 1) * PART_BYTES, min(number * PART_BYTES, size))
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
            with suppress(ClientError, BotoCoreError):  # `leftovers` finds what stays
                self._s3.abort_multipart_upload(**upload)
            raise

    def delete(self, key: str, unmodified_since: datetime | None = None) -> bool:
        """Delete it, unless it was modified since that time; whether it was, or could have been, there to delete.

        S3 cannot look and delete in one step. So this puts a mark beside it for that while, and whoever touches the object
        looks for the mark afterwards: either the touch is seen here, or the mark is seen there.
        """
        with self._errors("delete", key):
            if unmodified_since is None:
                _repeating(lambda: self._s3.delete_object(**self._at(key)))
                return True
            begun, mark = time.monotonic(), self._mark(key)
            _repeating(lambda: self._adapting(lambda: self._s3.put_object(**mark, **self._checksum(io.BytesIO()), Body=b"")))
            try:
                with self.open(key, -1) as stream:
                    is_old = stream.listed.modified_at <= unmodified_since
                if is_old and time.monotonic() - begun < _MARK_S / 2:
                    _repeating(lambda: self._s3.delete_object(**self._at(key)))
                    return True
            except ObjectMissing:
                pass
            finally:
                _repeating(lambda: self._s3.delete_object(**mark))
            return False

    def touch(self, key: str) -> None:
        """Make it as young as one just written, by copying it onto itself.

        Raises ObjectMissing where a `delete` was faster.
        """
        with self._errors("touch", key):
            at = self._at(key)
            _repeating(lambda: self._s3.copy_object(**at, **self._as(key), CopySource=at, MetadataDirective="REPLACE"))
            self._outlast_deletion(key)

    def _outlast_deletion(self, key: str) -> None:
        give_up = time.monotonic() + _PATIENCE_S
        while self._is_being_deleted(key):
            if time.monotonic() > give_up:
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
        # By the server's own clock. One older than that was left behind: its writer does not delete so late.
        date = s3_answers.field(answer["ResponseMetadata"]["HTTPHeaders"], "date", self._name(key))
        now = parsedate_to_datetime(date)
        return bool(now - answer["LastModified"] < timedelta(seconds=_MARK_S))

    def _mark(self, key: str) -> dict[str, str]:
        self._at(key)
        return {"Bucket": self.bucket, "Key": f"{self.prefix}deleting/{key}"}

    def objects(self, after: str = "") -> Iterator[Listed]:
        """The objects whose names come after that one, in the order of their names; other objects are passed over."""
        pages = self._s3.get_paginator("list_objects_v2")
        with self._errors("list", ""):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix, StartAfter=self.prefix + after):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self.prefix)
                    if is_key(key):
                        yield Listed(key, entry["Size"], entry["LastModified"])

    def orphans(self, before: datetime, *, remove: bool = False) -> list[str]:
        """Uploads in parts and marks of deletions from before that time, which nobody ended; given up if asked to."""
        found = []
        marks = self._s3.get_paginator("list_objects_v2")
        with self._errors("list", ""):
            for page in marks.paginate(Bucket=self.bucket, Prefix=f"{self.prefix}deleting/"):
                for entry in page.get("Contents", ()):
                    if entry["LastModified"] < before:
                        found.append(entry["Key"])
                        if remove:
                            self._s3.delete_object(Bucket=self.bucket, Key=entry["Key"])
        pages = self._s3.get_paginator("list_multipart_uploads")
        with self._errors("list", ""):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for upload in page.get("Uploads", ()):
                    if is_key(upload["Key"].removeprefix(self.prefix)) and upload["Initiated"] < before:
                        found.append(f"{upload['Key']} {upload['UploadId']}")
                        if remove:
                            self._s3.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return found

    def close(self) -> None:
        """Close the connections."""
        self._s3.close()

    def _at(self, key: str) -> dict[str, str]:
        if not is_key(key):
            raise ValueError(f"not the name of an object: {key!r}")
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _as(self, key: str) -> dict[str, str]:
        return {"ContentType": "application/zstd" if key.endswith(".zst") else "application/octet-stream", **self._kept}

    def _name(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def _checksum(self, body: BinaryIO) -> dict[str, str]:
        """What the server compares with what arrives: CRC-32, or the MD5 that every server knows."""
        body.seek(0)
        pieces = iter(lambda: body.read(_READ_BYTES), b"")
        if self._knows_checksums:
            name, value = "ChecksumCRC32", reduce(lambda so_far, piece: zlib.crc32(piece, so_far), pieces, 0).to_bytes(4)
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
        """Do without conditions, then without CRC-32, where the server answers that it has no such thing.

        S3's own word for it is 501; others answer InvalidArgument: "Unsupported header ...".
        """
        while True:
            tried = self._knows_conditions, self._knows_checksums
            try:
                return call()
            except ClientError as error:
                said = error.response.get("Error", {})
                unknown = said.get("Code") == "InvalidArgument" and "header" in str(said.get("Message")).lower()
                if not (s3_answers.status(error) == 501 or unknown) or not any(tried):
                    raise
            if tried == (self._knows_conditions, self._knows_checksums):  # else another thread has learned it meanwhile
                if self._knows_conditions:
                    self._knows_conditions = False
                else:
                    self._knows_checksums = False

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        """What boto3 raises, as what the caller can do about it. All but a missing object passes or can be mended."""
        try:
            if self._lacks_credentials:
                self._connect()
            yield
        except ClientError as error:
            raise s3_answers.translate(error, verb, self._name(key), is_object=bool(key)) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            self._lacks_credentials = isinstance(error, NoCredentialsError)
            raise ObjectStoreOutage(f"cannot {verb} {self._name(key)}: {error}") from error


class _Part(io.RawIOBase):
    """A part of a file that several threads read, as a file of its own: it is sent without being in memory."""

    def __init__(self, file: int, start: int, stop: int) -> None:
        self._file, self._start, self._length, self._position = file, start, stop - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        data = os.pread(self._file, left if size is None or size < 0 else min(size, left), self._start + self._position)
        self._position += len(data)
        return data


def _wait_after_conflict(attempt: int) -> None:
    """Wait for a random time that doubles with each attempt, so that those who collided do not collide again."""
    time.sleep(_CONFLICT_WAIT_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311


def _repeating(call: Callable[[], object]) -> None:
    """Do it again after conflicts over its key. Raises ClientError."""
    for attempt in range(_CONFLICT_ATTEMPTS):
        try:
            call()
        except ClientError as error:
            if not s3_answers.is_conflict(error) or attempt + 1 == _CONFLICT_ATTEMPTS:
                raise
            _wait_after_conflict(attempt)
        else:
            return
