"""What the answers of an S3 server mean: about which part of an object they are, and whom a refusal concerns."""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from evalstore.objects.frames import Body
from models.errors import ObjectMissing, ObjectStoreOutage, ObjectUnavailable

_READ_BYTES: Final = 256 * 1024
_RANGE: Final = re.compile(r"bytes (\d+)-(-?\d+)/(\d+|\*)", re.ASCII)

# What an operator can do about a refusal; all others say enough.
_ADVICE: Final = {
    "AccessDenied": "check the policy (for lack of s3:ListBucket, S3 says this of an object that does not exist, too)",
    "InvalidObjectState": "the object was moved to a class that cannot be read at once: restore it",
    "NoSuchBucket": "create the bucket, or correct the setting",
}
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html: refusals with a status of 4xx that every request meets.
# All others of 4xx are about the request, its object or the key that encrypts the object.
_ABOUT_ALL: Final = frozenset(
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
# Try the whole write again. 409: a delete or another write of the key came in between. The others: the upload or a part of it
# is gone, or the body was damaged on its way.
_CONFLICTS: Final = frozenset(
    {
        *("ConditionalRequestConflict", "OperationAborted", "Conflict", "NoSuchUpload", "InvalidPart", "InvalidPartOrder"),
        *("BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"),
    }
)


def status(error: ClientError) -> int:
    """The HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: ClientError) -> str:
    """The server's name of the error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_conflict(error: ClientError) -> bool:
    """Whether the same write may succeed a moment later. The client repeats what is left to it, such as 503, by itself."""
    return status(error) == 409 or code(error) in _CONFLICTS


def is_written_already(error: ClientError) -> bool:
    """Whether the condition "only if there is none" failed. Old releases of MinIO say so with 304."""
    return status(error) in {304, 412}


def translate(error: ClientError, verb: str, name: str, *, is_object: bool) -> Exception:
    """What the caller can do about a refusal: all but a missing object passes or can be mended."""
    named = code(error)
    if named == "NoSuchKey":
        return ObjectMissing(f"object {name} does not exist")
    said = error.response.get("Error", {}).get("Message") or f"HTTP status {status(error)}"
    advice = f"; {_ADVICE[named]}" if named in _ADVICE else ""
    message = f"cannot {verb} {name}: {named}: {said}{advice}"
    if is_object and 400 <= status(error) < 500 and status(error) != 429 and named not in _ABOUT_ALL:
        return ObjectUnavailable(message, needs_operator=named == "InvalidObjectState")
    return ObjectStoreOutage(message)


def field(answer: Mapping[str, Any], name: str, of: str) -> Any:
    """A field of an answer. Raises ObjectStoreOutage if the server, or a proxy before it, left it out."""
    if name not in answer:
        raise ObjectStoreOutage(f"{of}: the server answers without {name}")
    return answer[name]


def is_unknown_range(error: ClientError) -> bool:
    """Whether the server refuses the form of the range."""
    return code(error) in {"InvalidArgument", "InvalidHeaderValue", "InvalidRange", "InvalidRequest", "NotImplemented"}


class Extent(NamedTuple):
    """Where in the object an answer's body begins, its length, and the object's size; None: the answer does not say."""

    begin: int
    length: int | None
    size: int | None


def extent(answer: Mapping[str, Any]) -> Extent:
    """Read Content-Range and Content-Length. Without Content-Range the body is the whole object."""
    length = answer.get("ContentLength")
    if (found := _RANGE.fullmatch(answer.get("ContentRange", ""))) is None:
        return Extent(0, length, length)
    begin, last, size = int(found[1]), int(found[2]), found[3]
    return Extent(begin, max(0, last + 1 - begin), None if size == "*" else int(size))


class Skipping:
    """A body without its first bytes, which are read and dropped when the first byte after them is asked for."""

    def __init__(self, body: Body, skip_bytes: int) -> None:
        self._body, self._skip_bytes = body, skip_bytes

    def read(self, amount: int, /) -> bytes:
        while self._skip_bytes:
            dropped = len(self._body.read(min(self._skip_bytes, _READ_BYTES)))
            if not dropped:
                return b""
            self._skip_bytes -= dropped
        return self._body.read(amount)

    def close(self) -> object:
        return self._body.close()
