"""The viewer of a page: who it is, and what they may see and do."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from evalstore.api.problems import Problem
from evalstore.storage.operator_actions import Intent
from evalstore.storage.visibility import EVERYTHING, Visibility

TYPED_ABOVE: Final = 1_000
_REASON_CHARACTERS: Final = 1_000


class Viewer(NamedTuple):
    """`token`: of the session, or for a proxy's user of this browser. `may_act`: has the scope admin, and actions are on."""

    actor: str
    key_id: str | None
    scopes: frozenset[str]
    token: str
    may_act: bool
    visibility: Visibility = EVERYTHING

    @property
    def csrf(self) -> str:
        """The token that each form repeats. Only pages of this service can know it."""
        return hashlib.sha256(f"csrf {self.token}".encode()).hexdigest()

    @property
    def is_restricted(self) -> bool:
        return self.visibility.is_restricted

    def check_csrf(self, sent: str) -> None:
        """Raises Problem (403) unless a form of this browser's pages sent the request."""
        if not hmac.compare_digest(sent.encode(), self.csrf.encode()):
            raise Problem(403, "forbidden", "the form is not of this session: load the page again")


def intent(viewer: Viewer, form: Mapping[str, str], verb: str, selection: Mapping[str, Any]) -> Intent:
    """Return the action as `operator_actions` records it. Raises Problem (422) without a reason."""
    reason = form.get("reason", "").strip()
    if not reason:
        raise Problem(422, "invalid", "give a reason: the audit shows it")
    return Intent(verb, viewer.actor, reason[:_REASON_CHARACTERS], selection)


def check_typed_count(form: Mapping[str, str], count: int) -> None:
    """Raises Problem (422) if more than TYPED_ABOVE things are affected and the form does not repeat their number."""
    typed = form.get("count", "").replace(",", "").strip()
    if count > TYPED_ABOVE and typed != str(count):
        raise Problem(422, "invalid", f"this affects {count:,}: type the number {count} to confirm")
