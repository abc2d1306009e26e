"""Interpret the answers of an S3 server: the range of a body, and whether an error concerns one object or all."""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from evalstore.objects.frames import Body
from models.errors import ObjectMissing, ObjectStoreOutage, ObjectUnavailable

_READ_BYTES: Final = 256 * 1024
_RANGE: Final = re.compile(r"bytes (\d+)-(-?\d+)/(\d+|\*)", re.ASCII)

# Advice to the operator, for refusals whose own message is not enough.
_ADVICE: Final = {
    "AccessDenied": "check the policy (without s3:ListBucket, S3 answers this for a missing object too)",
    "InvalidObjectState": "the object is in a storage class that cannot be read at once: restore it",
    "NoSuchBucket": "create the bucket, or correct the setting",
}
# Errors with status 4xx that concern every request (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).
# Other errors with 4xx concern the request, its object, or the object's encryption key.
_STORE_ERRORS: Final = frozenset(
    {
        *("AccountProblem", "AllAccessDisabled", "AuthorizationHeaderMalformed", "CredentialsNotSupported", "ExpiredToken"),
        *(
            "IllegalLocationConstraintException",
            "InvalidAccessKeyId",
            "InvalidBucketName",
            "InvalidBucketState",
            "InvalidPayer",
        ),
        *("InvalidSecurity", "InvalidToken", "NoSuchBucket", "NotSignedUp", "QuotaExceeded", "RequestTimeTooSkewed"),
        *("SignatureDoesNotMatch", "TokenRefreshRequired", "UnauthorizedAccess", "UserSuspended"),
        *(
            "SlowDown",
            "ServiceUnavailable",
            "Throttling",
            "ThrottlingException",
            "RequestLimitExceeded",
            "KMS.ThrottlingException",
        ),
        *("TooManyRequests", "TooManyRequestsException"),
    }
)
# Errors after which the whole write is repeated. Status 409: another write or delete of the key interfered. Others: a part of
# the upload is missing, or the body was damaged in transfer.
_CONFLICTS: Final = frozenset(
    {
        *("ConditionalRequestConflict", "OperationAborted", "Conflict", "NoSuchUpload", "InvalidPart", "InvalidPartOrder"),
        *("BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"),
    }
)


def status(error: ClientError) -> int:
    """Return the HTTP status, or 0."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: ClientError) -> str:
    """Return the server's error code, such as NoSuchKey."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_conflict(error: ClientError) -> bool:
    """Return whether the same write may succeed a moment later. boto3 itself repeats after other errors, such as 503."""
    return status(error) == 409 or code(error) in _CONFLICTS


def is_written_already(error: ClientError) -> bool:
    """Return whether `If-None-Match: *` failed. Old releases of MinIO answer 304."""
    return status(error) in {304, 412}


def translate(error: ClientError, verb: str, name: str, *, is_object: bool) -> Exception:
    """Translate an error into ObjectMissing, ObjectUnavailable (one object) or ObjectStoreOutage (all)."""
    error_code = code(error)
    if error_code == "NoSuchKey":
        return ObjectMissing(f"object {name} does not exist")
    reason = error.response.get("Error", {}).get("Message") or f"HTTP status {status(error)}"
    advice = f"; {_ADVICE[error_code]}" if error_code in _ADVICE else ""
    message = f"cannot {verb} {name}: {error_code}: {reason}{advice}"
    if is_object and 400 <= status(error) < 500 and status(error) != 429 and error_code not in _STORE_ERRORS:
        return ObjectUnavailable(message, needs_operator=error_code == "InvalidObjectState")
    return ObjectStoreOutage(message)


def field(answer: Mapping[str, Any], name: str, url: str) -> Any:
    """Return a field of an answer. Raises ObjectStoreOutage if the server, or a proxy before it, left it out."""
    if name not in answer:
        raise ObjectStoreOutage(f"{url}: the server answers without {name}")
    return answer[name]


def is_unknown_range(error: ClientError) -> bool:
    """Return whether the server refuses a suffix range."""
    return code(error) in {"InvalidArgument", "InvalidHeaderValue", "InvalidRange", "InvalidRequest", "NotImplemented"}


class Extent(NamedTuple):
    """The position and length of a body within its object, and the object's size. None: unknown."""

    begin: int
    length: int | None
    size: int | None


def extent(answer: Mapping[str, Any]) -> Extent:
    """Decode Content-Range and Content-Length. Without Content-Range the body is the whole object."""
    length = answer.get("ContentLength")
    if (match := _RANGE.fullmatch(answer.get("ContentRange", ""))) is None:
        return Extent(0, length, length)
    begin, last, size = int(match[1]), int(match[2]), match[3]
    return Extent(begin, max(0, last + 1 - begin), None if size == "*" else int(size))


class Skipping:
    """A body without its first bytes. The first read drops them."""

    def __init__(self, body: Body, skip_bytes: int) -> None:
        self._body, self._skip_bytes = body, skip_bytes

    def read(self, amount: int, /) -> bytes:
        while self._skip_bytes:
            read_bytes = len(self._body.read(min(self._skip_bytes, _READ_BYTES)))
            if not read_bytes:
                return b""
            self._skip_bytes -= read_bytes
        return self._body.read(amount)

    def close(self) -> object:
        return self._body.close()
