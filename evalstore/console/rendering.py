"""Templates, their filters, and the headers of pages.

Everything that a sender controls passes through `text`, which escapes it, shows control and bidirectional characters as
escapes, isolates its direction, and cuts it.
"""

import gzip
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response

from evalstore.console import static

_CUT: Final = 300
_GZIP_FROM_BYTES: Final = 1_000
# C0 and C1 controls, bidirectional controls, zero-width characters, lone surrogates.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2028\u2029\u2060-\u2069\ufeff\ud800-\udfff]"
)
_DASH: Final = "\u2013"  # for a missing value
_NONE: Final = Markup(f'<span class="none">{_DASH}</span>')  # noqa: S704
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def visible(value: object) -> Markup:
    """Escape text for HTML. Show characters that are invisible, or change the order of others, as escapes."""
    return mark_unsafe(str(escape(str(value))))


def mark_unsafe(html: str) -> Markup:
    """Show the characters of HTML that are invisible, or change the order of others, as escapes. Trusts the HTML."""
    return Markup(_UNSAFE.sub(lambda match: f'<span class="esc">{_escape(match[0])}</span>', html))  # noqa: S704


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def text(value: object, most: int = _CUT) -> Markup:
    """Return text of a sender, isolated and cut to `most` characters. None gives a dash."""
    if value is None:
        return _NONE
    shown = str(value)
    rest = Markup('<span class="cut" title="cut">…</span>') if len(shown) > most else Markup()
    return Markup("<bdi>{}{}</bdi>").format(visible(shown[:most]), rest)


def when(value: datetime | str | None) -> Markup:
    """Return a time. A script shows it in the reader's time zone, with UTC on hover."""
    if value is None:
        return _NONE
    at = datetime.fromisoformat(value) if isinstance(value, str) else value
    utc = at.astimezone(UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(utc.isoformat(), f"{utc:%Y-%m-%d %H:%M:%S}")


def duration(seconds: float | None) -> str:
    """Return a number of seconds in the largest fitting unit."""
    if seconds is None:
        return _DASH
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.3g} s"


def size(count: float | None) -> str:
    """Return a number of bytes in the largest fitting unit."""
    if count is None:
        return _DASH
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} {_UNITS[-1]}"


def number(value: float | None) -> str:
    """Return a number with separators."""
    if value is None:
        return _DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def segment(value: str) -> str:
    """Quote a value for a segment of a path."""
    return quote(value, safe=":@+=~")


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return _DASH if share is None else f"{share:.1%}".replace("%", " %")


def milliseconds(value: float | None) -> str:
    """Return a duration that is given in milliseconds."""
    return _DASH if value is None else duration(value / 1000)


@cache
def environment() -> Environment:
    """Return the templates of this package."""
    made = Environment(
        loader=PackageLoader("evalstore.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {"text": text, "when": when, "duration": duration, "size": size, "number": number}
    made.filters |= {"visible": visible, "segment": segment, "percent": percent, "milliseconds": milliseconds}
    made.globals["static"] = static.address
    return made


def fragment(template: str, **values: Any) -> str:
    """Return a part of a page, for streams. It holds no attributes of htmx."""
    return environment().get_template(template).render(**values)


def page(request: Request, template: str, values: Mapping[str, Any], status: int = 200) -> Response:
    """Return a page. Scripts and styles come from files only: the browser runs nothing that the page itself holds."""
    nonce = secrets.token_urlsafe(16)
    root = request.scope.get("root_path", "")
    shown = environment().get_template(template).render({**values, "root": root, "nonce": nonce})
    body = shown.encode("utf-8", "backslashreplace")
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'; require-trusted-types-for 'script'; trusted-types htmx"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Vary": "Accept, Accept-Encoding, Cookie",
    }
    if len(body) >= _GZIP_FROM_BYTES and "gzip" in request.headers.get("accept-encoding", ""):
        body = gzip.compress(body, 5)
        headers["Content-Encoding"] = "gzip"
    return Response(body, status, headers=headers, media_type="text/html; charset=utf-8")
