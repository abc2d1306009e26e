"""`/console/keys`: the keys of the HTTP service."""

from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from evalstore.api.problems import Problem, invalid
from evalstore.console.pages import Answer, Done, Pages, Shown, View, render
from evalstore.storage import api_keys
from evalstore.storage.api_keys import SCOPES
from evalstore.storage.visibility import Visibility
from models.errors import Fault, printable

pages = Pages()


@pages.page("/keys", "keys.html", "Keys", key="k", for_restricted=True)
async def keys(view: View) -> Answer:
    """List the keys. Without the scope admin, a viewer sees only the own key."""
    own = view.viewer.key_id
    rows = [api_keys.row(key) for key in await view.service.run(api_keys.all_keys)]
    if "admin" not in view.viewer.scopes:
        rows = [row for row in rows if row["key_id"] == own]
    rows.sort(key=lambda row: (row["key_id"] != own, row["state"] != "usable", row["created_at"]))
    return Shown({"keys": rows, "own": own}, {"scopes": SCOPES})


@pages.action("/keys")
async def create(view: View) -> Response:
    """Create a key, and show it this once."""
    name, scopes = view.form.get("name", "").strip(), [scope for scope in SCOPES if view.form.get(scope)]
    faults = []
    if not name or "\0" in name or printable(name) != name or len(name) > 200:
        faults.append(Fault("name", "expected 1 to 200 characters"))
    if not scopes:
        faults.append(Fault("scope", "choose at least one"))
    parsed = {
        field: _parsed(view, field, parse, faults)
        for field, parse in (
            ("expires_in", api_keys.parse_duration),
            ("submitter", api_keys.parse_submitter),
            ("run_prefix", api_keys.parse_run_prefix),
            ("rate", api_keys.parse_rate),
        )
    }
    visibility = Visibility(parsed["submitter"], parsed["run_prefix"])
    if visibility.is_restricted and "admin" in scopes:
        faults.append(Fault("scope", "a key with the scope admin cannot be restricted"))
    if faults:
        raise invalid(faults)
    expires_at = datetime.now(UTC) + parsed["expires_in"] if parsed["expires_in"] else None
    intent = view.intent("keys create", {"name": name, "scopes": scopes})
    key, stored = await view.service.run(
        lambda conn: api_keys.create(conn, name, scopes, expires_at, visibility=visibility, rate=parsed["rate"], intent=intent)
    )
    return render(view, "key_created.html", "New key", {"key": key, **api_keys.row(stored)}, 201)


def _parsed(view: View, field: str, parse: Any, faults: list[Fault]) -> Any:
    text = view.form.get(field, "").strip()
    try:
        return parse(text) if text else None
    except ValueError as error:
        faults.append(Fault(field, str(error)))
        return None


@pages.action("/keys/{key_id}/revoke")
async def revoke(view: View) -> Done:
    """Revoke a key for good. Its sessions end, also this one."""
    key_id = view.path("key_id")
    intent = view.intent("keys revoke", {"key_ids": [key_id]})
    if not await view.service.run(lambda conn: api_keys.revoke(conn, [key_id], intent)):
        raise Problem(404, "not-found", f"there is no key {key_id[:100]!r} in the database: keys of settings end with them")
    own = key_id == view.viewer.key_id
    return Done("/console/login" if own else "/console/keys", f"Key {key_id} is revoked.")
