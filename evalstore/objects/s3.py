"""The object store in a bucket of S3, or of a server that speaks its protocol: `s3://bucket/prefix`."""

import base64
import hashlib
import io
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import reduce
from typing import Any, BinaryIO, TypeVar, cast

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from evalstore.objects.directory import Look
from evalstore.objects.frames import Encoder, Listed, Stream, is_key
from models.content import FRAME_BYTES
from models.errors import ObjectMissing, ObjectStoreOutage
from models.settings import Settings

MULTIPART_BYTES = 16 * 1024 * 1024
PART_BYTES = 8 * 1024 * 1024
PARTS_AT_ONCE = 2

_READ_BYTES = 256 * 1024
# For how long at most a mark says that an object is being deleted, and how long a `touch` waits for the end of that.
_MARK_S = 600
_PATIENCE_S = 10

_T = TypeVar("_T")

# What an operator can do about an answer that is no outage of the server; all others say enough.
_ADVICE = {
    "AccessDenied": "check the policy (for lack of s3:ListBucket, S3 says this of an object that does not exist, too)",
    "InvalidObjectState": "the object was moved to a class that cannot be read at once: restore it",
    "NoSuchBucket": "create the bucket, or correct the setting",
}


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
        config = Config(
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
        with self._errors("open", ""):
            session = boto3.session.Session()
            self._s3: Any = session.client("s3", endpoint_url=settings.s3_endpoint_url, config=config)
        kept = {"StorageClass": settings.s3_storage_class, "ServerSideEncryption": settings.s3_server_side_encryption}
        self._kept = {name: value for name, value in kept.items() if value}
        # Until the server answers that it knows no such thing.
        self._knows_conditions = self._knows_checksums = True

    def open(self, key: str, start: int, stop: int | None = None) -> Stream:
        """Bytes `start` to `stop` as stored, or for a negative start that many at the end, or all there are."""
        wanted = f"bytes={start}" if start < 0 else f"bytes={start}-{'' if stop is None else stop - 1}"
        with self._errors("read", key):
            try:
                answer = self._s3.get_object(**self._at(key), Range=wanted)
            except ClientError as error:
                if _status(error) != 416:
                    raise
                answer = self._s3.get_object(**self._at(key))  # it is empty, so that no part of it can be asked for
        length = int(answer["ContentLength"])
        stored_size = int(answer.get("ContentRange", f"/{length}").rpartition("/")[2])
        if start > 0 and "ContentRange" not in answer:
            answer["Body"].close()
            raise ObjectStoreOutage(f"{self._name(key)}: the server does not answer for a part of an object")
        listed = Listed(key, stored_size, answer["LastModified"])
        return Stream(answer["Body"], listed=listed, length=length, errors=self._errors)

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
            with self._errors("write", reference.key):
                try:
                    if size > MULTIPART_BYTES:
                        spool.flush()  # and is in a file: parts are read beside it
                        self._put_parts(reference.key, spool.fileno(), size, replace=found == "damaged")
                    else:
                        self._put(reference.key, cast("BinaryIO", spool), replace=found == "damaged")
                except ClientError as error:
                    if _status(error) == 412:  # another wrote the same meanwhile
                        return False
                    raise
            if found == "damaged":
                self._verify_kept(reference.key)
            return True

    def _verify_kept(self, key: str) -> None:
        """A `delete` that looked at what was there before would take what replaced it."""
        with self._errors("write", key):
            try:
                self._outlast_deletion(key)
            except ObjectMissing as error:
                raise ObjectStoreOutage(f"{self._name(key)} was deleted while it was written") from error

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
            return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

        pool = ThreadPoolExecutor(PARTS_AT_ONCE)
        try:
            parts = list(pool.map(put_part, range(1, -(-size // PART_BYTES) + 1)))
            self._adapting(
                lambda: self._s3.complete_multipart_upload(
                    **upload, **self._condition(replace), MultipartUpload={"Parts": parts}
                )
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            with suppress(ClientError, BotoCoreError):  # `leftovers` finds what stays
                self._s3.abort_multipart_upload(**upload)
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def delete(self, key: str, unmodified_since: datetime | None = None) -> bool:
        """Delete it, unless it was modified since that time; whether it was, or could have been, there to delete.

        S3 cannot look and delete in one step. So this puts a mark beside it for that while, and whoever touches the object
        looks for the mark afterwards: either the touch is seen here, or the mark is seen there.
        """
        with self._errors("delete", key):
            if unmodified_since is None:
                self._s3.delete_object(**self._at(key))
                return True
            begun, mark = time.monotonic(), self._mark(key)
            self._s3.put_object(**mark, Body=b"")
            try:
                with self.open(key, -1) as stream:
                    is_old = stream.listed.modified_at <= unmodified_since
                if is_old and time.monotonic() - begun < _MARK_S / 2:
                    self._s3.delete_object(**self._at(key))
                    return True
            except ObjectMissing:
                pass
            finally:
                self._s3.delete_object(**mark)
            return False

    def touch(self, key: str) -> None:
        """Make it as young as one just written, by copying it onto itself.

        Raises ObjectMissing where a `delete` was faster.
        """
        with self._errors("touch", key):
            at = self._at(key)
            self._s3.copy_object(**at, **self._as(key), CopySource=at, MetadataDirective="REPLACE")
            self._outlast_deletion(key)

    def _outlast_deletion(self, key: str) -> None:
        give_up = time.monotonic() + _PATIENCE_S
        while self._is_being_deleted(key):
            if time.monotonic() > give_up:
                raise ObjectStoreOutage(f"{self._name(key)} is being deleted")
            time.sleep(0.05)
        self.open(key, -1).__exit__()

    def _is_being_deleted(self, key: str) -> bool:
        try:
            answer = self._s3.head_object(**self._mark(key))
        except ClientError as error:
            if _status(error) == 404:
                return False
            raise
        # By the server's own clock. One older than that was left behind: its writer does not delete so late.
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
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
                if not (_status(error) == 501 or unknown) or not any(tried):
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
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code == "NoSuchKey":
                raise ObjectMissing(f"object {self._name(key)} does not exist") from None
            said = error.response.get("Error", {}).get("Message") or f"HTTP status {_status(error)}"
            advice = f"; {_ADVICE[code]}" if code in _ADVICE else ""
            raise ObjectStoreOutage(f"cannot {verb} {self._name(key)}: {code}: {said}{advice}") from error
        except (BotoCoreError, HTTPError, OSError) as error:
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


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
