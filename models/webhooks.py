"""Webhooks: how a subscription is checked, how a delivery is signed, and which addresses may be reached. No I/O."""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from models.confirmations import CONFIRMATIONS
from models.errors import Fault, InvalidEvent, printable
from models.events import identity
from models.networks import Network, is_allowed

EVENT_TYPES: Final = tuple(
    f"evaluation:{name}" for name in ("queued", "started", "completed", "failed", "timed_out", "cancelled", "lost")
)
STATUSES: Final = ("queued", "running", "completed", "failed", "timed_out", "cancelled", "lost")
TEST: Final = "storage:webhook:test"
# Standard Webhooks, "Signature scheme": a secret holds 24 to 64 bytes.
SECRET_BYTES: Final = (24, 64)
OVERLAP_S: Final = 86_400
_LONGEST_OVERLAP_S: Final = 30 * 86_400
_URL_CHARACTERS: Final = 2000
_TEXT_CHARACTERS: Final = 1000
_HOST: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*\.?", re.ASCII
)
# These ranges hold an IPv4 address, which `is_global` does not look at: IPv4-compatible, IPv4-mapped, NAT64, Teredo, 6to4.
_EMBEDDING: Final = tuple(
    map(
        ipaddress.IPv6Network,
        ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"),
    )
)


class AddressRefused(Exception):
    """The address belongs to a network that webhooks may not reach."""


class Subscription(NamedTuple):
    """The address and the filters of a subscription. An empty filter matches all.

    `event_types`: types of events, or of confirmations; one of them has to match.
    """

    url: str
    event_types: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    run_id: str | None = None
    submitter: str | None = None

    def matches(self, types: Sequence[str], status: str | None, run_id: str | None, submitter: str | None) -> bool:
        """Whether a confirmation of these types is to be delivered."""
        return (
            (not self.event_types or not set(self.event_types).isdisjoint(types))
            and (not self.statuses or status in self.statuses)
            and self.run_id in {None, run_id}
            and self.submitter in {None, submitter}
        )


def check_address(text: str, networks: Sequence[Network], *, is_tls: bool) -> None:
    """Raise AddressRefused unless a webhook may connect to this IP address.

    Public addresses may be reached by TLS. Others, and those that embed an IPv4 address, need a network in `networks`.
    """
    address = ipaddress.ip_address(text)
    if is_allowed(address, networks):
        return
    if not is_tls:
        raise AddressRefused(f"{address}: http needs a network in EVALSTORE_WEBHOOK_ALLOW")
    is_special = not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified
    if isinstance(address, ipaddress.IPv6Address):
        is_special |= address.is_site_local or address.scope_id is not None or is_allowed(address, _EMBEDDING)
    if is_special:
        raise AddressRefused(f"{address} is no public address, and no network in EVALSTORE_WEBHOOK_ALLOW holds it")


def parse_subscription(given: Mapping[str, Any], networks: Sequence[Network]) -> tuple[Subscription, str]:
    """Return the subscription that a JSON object describes, and its secret, a new one where it has none.

    Raises InvalidEvent, which names every wrong field.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    known = {*Subscription._fields, "secret"}
    faults = [
        Fault(name, f"there is no such field; there are {', '.join(sorted(known))}") for name in sorted(fields.keys() - known)
    ]
    faults += _url_faults(fields.get("url"), networks)
    for name, allowed in (("event_types", (*EVENT_TYPES, *CONFIRMATIONS)), ("statuses", STATUSES)):
        value = fields.get(name, [])
        if not isinstance(value, list | tuple) or any(one not in allowed for one in value):
            faults.append(Fault(name, f"expected a list of {', '.join(allowed)}"))
    if "run_id" in fields and identity({"eval_id": fields["run_id"]})[0] is None:
        faults.append(Fault("run_id", "expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -"))
    submitter = fields.get("submitter", "")
    if (
        not isinstance(submitter, str)
        or len(submitter) > _TEXT_CHARACTERS
        or "\0" in submitter
        or printable(submitter) != submitter
    ):
        faults.append(Fault("submitter", f"expected text of up to {_TEXT_CHARACTERS:,} characters"))
    secret = fields.pop("secret", None) or new_secret()
    faults += secret_faults(secret)
    if faults:
        raise InvalidEvent(faults)
    for name in ("event_types", "statuses"):
        fields[name] = tuple(dict.fromkeys(fields.get(name, ())))
    return Subscription(**fields), secret


def _url_faults(url: object, networks: Sequence[Network]) -> list[Fault]:
    problem = "required" if url is None else "expected text" if not isinstance(url, str) else _url_problem(url, networks)
    return [Fault("url", problem)] if problem else []


def _url_problem(url: str, networks: Sequence[Network]) -> str:
    if len(url) > _URL_CHARACTERS or not re.fullmatch(r"[!-~]+", url):
        return (
            f"expected up to {_URL_CHARACTERS:,} printable ASCII characters without spaces; a name of others in its xn-- form"
        )
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "expected an address like https://host/path"
    if parts.scheme not in {"https", "http"} or not host or port == 0 or "\\" in url:
        return "expected an address like https://host/path"
    if parts.username is not None or parts.password is not None or "#" in url:
        return "expected no user, no password and no #"
    if parts.scheme == "http" and not networks:
        return "expected https: http is for networks in EVALSTORE_WEBHOOK_ALLOW alone"
    literal = "127.0.0.1" if host == "localhost" or host.endswith(".localhost") else _literal(host)
    if literal is None:
        return "" if _HOST.fullmatch(host) else "expected a host name or an IP address"
    try:
        check_address(literal, networks, is_tls=parts.scheme == "https")
    except AddressRefused as error:
        return str(error)
    return ""


def _literal(host: str) -> str | None:
    """The IP address that a host is, also in the short forms that resolvers take (127.1, 0x7f000001)."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


def new_secret() -> str:
    """Return a secret in the form of Standard Webhooks."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def secret_faults(secret: object) -> list[Fault]:
    """Return the faults of a secret: none if it is valid."""
    try:
        size = len(_key(secret)) if isinstance(secret, str) and secret.startswith("whsec_") else 0
    except (binascii.Error, ValueError):
        size = 0
    low, high = SECRET_BYTES
    return [] if low <= size <= high else [Fault("secret", f"expected whsec_ and the base64 of {low} to {high} random bytes")]


def parse_rotation(given: Mapping[str, Any]) -> tuple[str, float]:
    """Return the secret that a JSON object gives, or a new one, and for how many seconds the old one stays valid.

    Raises InvalidEvent.
    """
    faults = [
        Fault(name, "there is no such field; there are overlap_s, secret")
        for name in sorted(given.keys() - {"secret", "overlap_s"})
    ]
    secret, overlap_s = given.get("secret") or new_secret(), given.get("overlap_s", OVERLAP_S)
    faults += secret_faults(secret)
    if isinstance(overlap_s, bool) or not isinstance(overlap_s, int | float) or not 0 <= overlap_s <= _LONGEST_OVERLAP_S:
        faults.append(Fault("overlap_s", f"expected a number of seconds from 0 to {_LONGEST_OVERLAP_S:,}"))
    if faults:
        raise InvalidEvent(faults)
    return secret, float(overlap_s)


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix("whsec_"), validate=True)


def signed_headers(message_id: str, at: datetime, body: bytes, signing_secrets: Sequence[str]) -> dict[str, str]:
    """The headers of a delivery, with a signature by each secret.

    https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
    """
    seconds = str(int(at.timestamp()))
    signed = f"{message_id}.{seconds}.".encode() + body
    signatures = [
        "v1," + base64.b64encode(hmac.new(_key(secret), signed, hashlib.sha256).digest()).decode() for secret in signing_secrets
    ]
    return {"webhook-id": message_id, "webhook-timestamp": seconds, "webhook-signature": " ".join(signatures)}


def body(type_: str, at: str, data: Mapping[str, Any]) -> bytes:
    """The JSON object that is delivered."""
    return json.dumps({"type": type_, "timestamp": at, "data": data}, separators=(",", ":"), ensure_ascii=False).encode()


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)
