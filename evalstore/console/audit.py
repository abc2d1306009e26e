"""`/console/audit`: who did what, when and why."""

from evalstore.api import cursors
from evalstore.console import forms
from evalstore.console.pages import Answer, Pages, Shown, View
from evalstore.storage import operator_actions
from evalstore.storage.operator_actions import Filter

pages = Pages()
_LIMIT = 50


@pages.page("/audit", "audit.html", "Audit", key="u")
async def audit(view: View) -> Answer:
    """List the changes by operators, the newest first."""
    chosen, before = Filter(view.query("actor"), view.query("verb")), forms.position_of(view, int)
    rows = await view.service.run(lambda conn: operator_actions.page(conn, chosen, _LIMIT + 1, before))
    following = cursors.encode_time(rows[_LIMIT - 1]["at"], rows[_LIMIT - 1]["id"]) if len(rows) > _LIMIT else None
    return Shown(
        {"actions": rows[:_LIMIT], "next": following},
        {
            "form": chosen,
            "first_link": view.link(cursor=None) if before else None,
            "next_link": view.link(cursor=following) if following else None,
        },
    )
