"""`/console/dead-letters`: groups, single dead letters, edits, redrives of everything that a filter matches, and the export."""

import hashlib
import re
from collections.abc import Generator
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection
from starlette.responses import Response

from evalstore.api import cursors, exports
from evalstore.api.problems import Problem, invalid
from evalstore.api.rendering import to_json
from evalstore.console import forms
from evalstore.console.pages import Answer, Done, Pages, Shown, View, render
from evalstore.storage import dead_letter_messages as messages
from evalstore.storage import dead_letters as letters
from evalstore.storage.dead_letters import Selection
from evalstore.storage.redrives import Pace
from models.errors import Fault, InvalidEvent, Outage
from models.events import decode
from tasks.actor import ACTOR
from tasks.broker import broker
from tasks.redrives import ask, refuse_without_redis

pages = Pages()

_STATES: Final = {
    "": ("dead", "redriving"),
    "dead": ("dead",),
    "redriving": ("redriving",),
    "stored": ("stored",),
    "all": ("dead", "redriving", "stored"),
}
_FILTERS: Final = ("queue", "error_class", "signature", "eval_id", "match", "since", "until", "id")
_LIMIT: Final = 50
_GROUPS: Final = 100
# Groups are counted among so many letters: a page must not sort millions.
_GROUPED: Final = 200_000
_EXPORTED: Final = 10
_SHOWN_CHARACTERS: Final = 64 * 1024
_EDITABLE_BYTES: Final = 256 * 1024
# In JSON these characters stand in texts only, so an escape means the same.
_INVISIBLE: Final = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2028\u2029\u2060-\u2069\ufeff\ud800-\udfff]")


def _selection(view: View, states: tuple[str, ...] | None = None) -> tuple[Selection, dict[str, Any]]:
    """Return the selection of the query, and its filters as `operator_actions` records them. Raises Problem (422)."""
    given = {name: value for name in _FILTERS if (value := view.query(name)) is not None}
    words: dict[str, Any] = dict(given)
    fields: dict[str, Any] = {name: given[name] for name in _FILTERS[:5] if name in given}
    for name in ("since", "until"):
        if (at := forms.time_of(view, name)) is not None:
            fields[name], words[name] = at, at.isoformat()
    if "id" in given:
        try:
            fields["ids"] = (UUID(given["id"]),)
        except ValueError:
            raise invalid([Fault("id", "expected the id of a dead letter")]) from None
    if states is None:
        state = view.query("state") or ""
        if state not in _STATES:
            raise invalid([Fault("state", f"expected {', '.join(filter(None, _STATES))}")])
        states = _STATES[state]
    return Selection(states=states, **fields), words


def _form(view: View) -> dict[str, str]:
    return {name: view.query(name) or "" for name in (*_FILTERS, "state")}


@pages.page("/dead-letters", "dead_letters.html", "Dead letters", key="d")
async def dead_letters(view: View) -> Answer:
    """Show groups by signature, and the newest dead letters."""
    chosen, words = _selection(view)
    position = forms.position_of(view, UUID)

    def work(conn: Connection) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        groups = [] if position else letters.groups(conn, chosen._replace(limit=_GROUPED))
        return groups, list(letters.find(conn, chosen._replace(limit=_LIMIT + 1), after=position))

    groups, rows = await view.service.run(work)
    last = rows[_LIMIT - 1] if len(rows) > _LIMIT else None
    following = cursors.encode_time(last["last_at"], last["id"]) if last else None
    counted = sum(group["count"] for group in groups)
    data = {"groups": groups[:_GROUPS], "groups_total": len(groups), "dead_letters": rows[:_LIMIT], "next": following}
    return Shown(
        data,
        {
            "form": _form(view),
            "is_filtered": bool(words),
            "counted": counted,
            "is_counted": counted < _GROUPED,
            "first_link": view.link(cursor=None) if position else None,
            "next_link": view.link(cursor=following) if following else None,
            "query": view.link(cursor=None, format=None, state=None),
            "link": lambda **changes: view.link(cursor=None, **changes),
        },
    )


@pages.page("/dead-letters/redrive", "dead_letters_redrive.html", "Redrive dead letters")
async def plan(view: View) -> Answer:
    """Show what a redrive would send: its groups and their number. Nothing is changed."""
    chosen, words = _plan(view)
    groups = await view.service.run(lambda conn: letters.groups(conn, chosen))
    data = {"filter": words, "count": sum(group["count"] for group in groups), "groups": groups[:_GROUPS]}
    more = {"form": _form(view), "max_redrives": view.query("max_redrives") or "", "groups_total": len(groups)}
    return Shown(data, {**more, "query": view.link(format=None), "link": view.link})


def _plan(view: View) -> tuple[Selection, dict[str, Any]]:
    chosen, words = _selection(view, ("dead",))
    most = forms.whole_number_of(view.query("max_redrives") or "", "max_redrives")
    return chosen._replace(fewer_redrives_than=most), words | ({"max_redrives": most} if most else {})


@pages.action("/dead-letters/redrive")
async def redrive(view: View) -> Done:
    """Send everything again that the filter of the address matches, at the pace of the form."""
    chosen, words = _plan(view)
    shown = forms.whole_number_of(view.form.get("shown", ""), "shown") or 0
    rate = forms.number_of(view.form.get("rate", ""), "rate", 0.0001, 1_000_000)
    canary = forms.whole_number_of(view.form.get("canary", ""), "canary")
    view.check_count(shown)
    options = {name: value for name, value in (("rate", rate), ("canary", canary)) if value is not None}
    intent = view.intent("redrive", words | options)
    await view.service.thread(lambda: refuse_without_redis(broker()))
    redrive_id, now = await view.service.run(
        lambda conn: letters.redrive(conn, chosen, intent, Pace(rate, canary), accept=lambda count: count <= shown)
    )
    if redrive_id is None:
        detail = f"{now:,} match by now and not {shown:,}: nothing is sent, look again" if now else "no dead letter matches now"
        raise Problem(409, "changed", detail)
    return await begun(view, redrive_id, f"{now:,} dead letters are sent again")


async def begun(view: View, redrive_id: UUID, sentence: str) -> Done:
    """Ask a worker to run a redrive, and go to its page."""
    try:
        await view.service.thread(lambda: ask(broker(), redrive_id))
    except Outage:
        sentence += ", once Redis is back"
    return Done(f"/console/redrives/{redrive_id}", sentence)


@pages.stream("/dead-letters/export")
async def export(view: View) -> Response:
    """Answer with all matching dead letters as lines of JSON, the oldest first, with their messages."""
    chosen, _ = _selection(view)

    def read(conn: Connection) -> Generator[list[dict[str, Any]]]:
        found = letters.find(conn, chosen, whole=True, oldest_first=True)
        while chunk := [row for _, row in zip(range(_EXPORTED), found, strict=False)]:
            yield chunk

    headers = {"Content-Disposition": 'attachment; filename="dead-letters.jsonl"', "Cache-Control": "no-store"}
    return await exports.stream(view.service, read, _line, headers)


def _line(letter: Any) -> bytes:
    return messages.export_line(letter, lambda value: to_json(value).decode()).encode()


@pages.page("/dead-letters/{letter_id}", "dead_letter.html", "Dead letter")
async def dead_letter(view: View) -> Answer:
    """Show a dead letter: its message beside its cause and traceback, and a form that edits the message."""
    letter = await _letter(view)
    return Shown(_data(letter), _editing(letter, None))


async def _letter(view: View) -> dict[str, Any]:
    letter_id = forms.uuid_of(view, "letter_id", "dead letter")
    letter = await view.service.run(lambda conn: letters.get(conn, letter_id))
    if letter is None:
        raise Problem(404, "not-found", f"there is no dead letter {letter_id}")
    return letter


def _decoded(letter: dict[str, Any]) -> Any:
    """Decode the message, or return its text if it is no JSON."""
    try:
        return messages.message_of(letter)
    except (InvalidEvent, RecursionError):
        return bytes(letter["message"]).decode(errors="backslashreplace")


def _data(letter: dict[str, Any]) -> dict[str, Any]:
    fields = {name: letter[name] for name in letters.COLUMNS}
    return {**fields, "size": len(letter["message"]), "message": _decoded(letter), "traceback": letter["traceback"]}


def _editing(letter: dict[str, Any], text: str | None, **more: Any) -> dict[str, Any]:
    """Return what the template needs besides the data. `text` is the edited message."""
    message = _decoded(letter)
    shown = message if isinstance(message, str) else messages.pretty(message)
    return {
        "shown": shown[:_SHOWN_CHARACTERS],
        "hidden": max(0, len(shown) - _SHOWN_CHARACTERS),
        "is_editable": letter["state"] == "dead" and len(letter["message"]) <= _EDITABLE_BYTES,
        "text": _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", shown) if text is None else text,
        "digest": _digest(letter),
        "diff": None,
        "fault": None,
        **more,
    }


def _digest(letter: dict[str, Any]) -> str:
    return hashlib.sha256(letter["message"]).hexdigest()


@pages.action("/dead-letters/{letter_id}")
async def preview(view: View) -> Response:
    """Show the difference that an edit makes, or its faults. Nothing is changed."""
    letter, text = await _letter(view), view.form.get("message", "")
    more: dict[str, Any] = {}
    try:
        new = decode(text.encode("utf-8", "surrogatepass"), "message")
        _edited(view, letter, new)
        more["diff"] = messages.difference(_decoded(letter), new)
    except (InvalidEvent, RecursionError) as error:
        more["fault"] = str(error) or "the message is nested too deeply"
    values = {**_data(letter), **_editing(letter, text, **more)}
    return render(view, "dead_letter.html", "Dead letter", values, 422 if more.get("fault") else 200)


def _edited(view: View, letter: dict[str, Any], new: Any) -> letters.Edited:
    return messages.edited(letter["message"], new, ACTOR, view.service.settings.max_content_bytes)


@pages.action("/dead-letters/{letter_id}/edit")
async def edit(view: View) -> Done:
    """Store the edited message, and send it again."""
    letter = await _letter(view)
    if letter["state"] != "dead" or _digest(letter) != view.form.get("digest"):
        raise Problem(409, "changed", "another operator redrove or changed it meanwhile: nothing is changed")
    new = decode(view.form.get("message", "").encode("utf-8", "surrogatepass"), "message")
    edited = _edited(view, letter, new)
    diff = messages.difference(_decoded(letter), new)
    if not diff:
        raise Problem(422, "invalid", "the message is unchanged")
    intent = view.intent("edit", {"ids": [str(letter["id"])]})
    await view.service.thread(lambda: refuse_without_redis(broker()))
    redrive_id, _ = await view.service.run(
        lambda conn: letters.redrive(
            conn, Selection(ids=(letter["id"],)), intent, Pace(), edited=edited, details={"diff": messages.recorded(diff)}
        )
    )
    if redrive_id is None:
        raise Problem(409, "changed", "another operator redrove or changed it meanwhile: nothing is changed")
    return await begun(view, redrive_id, "the edited message is sent again")
