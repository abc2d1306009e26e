"""Texts that a hostile sender puts into every field: they must be shown and never run."""

from typing import Final

# `evil.invalid` is asked for by none of our pages, and `window.ran` is set by no script of ours.
SCRIPTS: Final = (
    "<script>window.ran=1</script>",
    "</script><script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "<img src=https://evil.invalid/a.png>",
    '"><svg onload=window.ran=1>',
    "'><iframe src=javascript:parent.ran=1>",
    "</textarea><script>window.ran=1</script>",
    "</title><script>window.ran=1</script>",
    "</pre></code><img src=x onerror=window.ran=1>",
    "<a href=javascript:window.ran=1 autofocus onfocus=window.ran=1>x</a>",
    "<input autofocus onfocus=window.ran=1>",
    "<details open ontoggle=window.ran=1>",
    "<body onload=window.ran=1>",
    "<style>@import 'https://evil.invalid/a.css'</style>",
    "<link rel=stylesheet href=https://evil.invalid/b.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.invalid/'>",
    "<base href=https://evil.invalid/>",
    "<form action=https://evil.invalid/><button autofocus>x",
    "<object data=https://evil.invalid/></object><embed src=https://evil.invalid/>",
    "<video src=https://evil.invalid/v autoplay onerror=window.ran=1>",
    "<math><mtext></p><style><img src=x onerror=window.ran=1>",
    "<svg><script>window.ran=1</script></svg>",
    "<svg><animate onbegin=window.ran=1 attributeName=x dur=1s>",
    "<noscript><p title='</noscript><img src=x onerror=window.ran=1>'>",
    "<div hx-get=https://evil.invalid/ hx-trigger=load>",
    "<div hx-on:htmx:load=window.ran=1 hx-nonce=guess>",
    "<div hx-sse:connect=https://evil.invalid/>",
    "{{ cycler.__init__.__globals__ }}{% for x in y %}${window.ran=1}",
    "javascript:window.ran=1",
    "&lt;script&gt;window.ran=1&lt;/script&gt;&#60;script>window.ran=1</script>",
    "<plaintext>",
    "<!--<script>",
    "]]><script>window.ran=1</script>",
    "\x1b]8;;javascript:window.ran=1\x07link\x1b]8;;\x07\x1b[31m<b onclick=window.ran=1>",
    "\u202e<script>window.ran=1</script>\u202c\u2066\u200b",
    "' onmouseover='window.ran=1' x=\" onmouseover=\"window.ran=1",
    "../../console/logout?x=//evil.invalid",
)
_MOST: Final = 900


def texts() -> list[str]:
    """Return texts of at most 900 characters that hold all payloads, and one of a million columns."""
    found = [""]
    for payload in SCRIPTS:
        if len(found[-1]) + len(payload) >= _MOST:
            found.append("")
        found[-1] += payload + " "
    return [*found, "<img src=x onerror=window.ran=1>" + "w" * 1_000_000]
