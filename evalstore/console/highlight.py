"""Code with its syntax as classes, highlighted on the server.

Code is hostile. So only known lexers are used, on a bounded beginning with bounded lines: a regular expression of a lexer may
take time that grows faster than its input.
"""

from typing import Final

from markupsafe import Markup
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from evalstore.console import rendering

_MOST_CHARACTERS: Final = 32 * 1024
_LINE_CHARACTERS: Final = 1_000
_LANGUAGES: Final = frozenset(
    {
        *(
            "python",
            "python3",
            "javascript",
            "js",
            "typescript",
            "ts",
            "bash",
            "sh",
            "shell",
            "sql",
            "json",
            "java",
            "c",
            "cpp",
        ),
        *("c++", "csharp", "go", "rust", "ruby", "php", "r", "julia", "lua", "kotlin", "scala", "swift", "haskell", "perl"),
        *("yaml", "toml"),
    }
)


def lines(code: str, language: str | None) -> list[Markup]:
    """Return the lines of code as HTML. Unknown languages, and code that is too long, stay plain."""
    name = (language or "").lower()
    shown = code.split("\n")
    is_bounded = len(code) <= _MOST_CHARACTERS and max(map(len, shown)) <= _LINE_CHARACTERS
    if name in _LANGUAGES and is_bounded:
        try:
            lexer = get_lexer_by_name(name, stripnl=False, ensurenl=False)
        except ClassNotFound:
            return [_plain(line) for line in shown]
        html = highlight(code, lexer, HtmlFormatter(nowrap=True))
        return [rendering.mark_unsafe(line) for line in html.removesuffix("\n").split("\n")]
    return [_plain(line) for line in shown]


def _plain(line: str) -> Markup:
    if len(line) <= _LINE_CHARACTERS:
        return rendering.visible(line)
    rest = f"{len(line) - _LINE_CHARACTERS:,}"
    cut = Markup('<span class="cut"> … {} more characters in this line</span>').format(rest)
    return rendering.visible(line[:_LINE_CHARACTERS]) + cut
