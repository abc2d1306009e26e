"""The runbook: docs/operations.md as a page. The package holds a copy, so that it is at hand without a network."""

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from markupsafe import Markup, escape

from evalstore.console.pages import Answer, Pages, Shown, View

pages = Pages()

_INLINE: Final = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\[([^\]]+)\]\(([^)\s]+)\)")


class Runbook(NamedTuple):
    """The page as HTML, and its sections: anchor and title of each."""

    body: Markup
    sections: list[dict[str, str]]


@pages.page("/runbook", "runbook.html", "Runbook", key="b")
async def runbook(_view: View) -> Answer:
    """Show the runbook."""
    shown = page()
    return Shown({"sections": shown.sections}, {"body": shown.body})


@cache
def page() -> Runbook:
    """Return the runbook."""
    packaged = files("evalstore.console") / "operations.md"
    source: Any = packaged if packaged.is_file() else Path(__file__).parents[2] / "docs" / "operations.md"
    parts, sections = list[Markup](), list[dict[str, str]]()
    for block in _blocks(source.read_text(encoding="utf-8").splitlines()):
        if heading := re.fullmatch(r"(#{1,4}) (.+)", block[0]):
            level, title = len(heading[1]), heading[2]
            anchor = re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")
            parts.append(Markup('<h{} id="{}">{}</h{}>').format(level, anchor, _inline(title), level))
            sections.append({"anchor": anchor, "title": title})
        else:
            parts.append(_block(block))
    return Runbook(Markup("\n").join(parts), sections)


def _blocks(lines: list[str]) -> list[list[str]]:
    """Split the lines at empty lines, headings and fences."""
    found, block, is_code = list[list[str]](), list[str](), False
    for line in lines:
        is_fence = line.lstrip().startswith("```")
        if is_fence and not is_code:
            found, block, is_code = [*found, block], [line], True
        elif is_code:
            block.append(line)
            if is_fence:
                found, block, is_code = [*found, block], [], False
        elif not line.strip() or line.startswith("#"):
            found, block = [*found, block, [line] if line.strip() else []], []
        else:
            block.append(line)
    return [each for each in [*found, block] if each]


def _block(lines: list[str]) -> Markup:
    if lines[0].lstrip().startswith("```"):
        return Markup("<pre tabindex=0><code>{}</code></pre>").format("\n".join(lines[1:-1]))
    if lines[0].startswith("|"):
        rows = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in lines
            if not re.match(r"\|[\s:|-]+$", line)
        ]
        # An empty corner is no header.
        head = Markup("").join(Markup("<th>{}</th>").format(_inline(cell)) if cell else Markup("<td></td>") for cell in rows[0])
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(_inline(cell)) for cell in row))
            for row in rows[1:]
        )
        return Markup(
            '<div class="scroll" tabindex="0"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
        ).format(head, body)
    if item := re.match(r"(\d+\.|[-*]) ", lines[0]):
        items: list[str] = []
        for line in lines:
            if re.match(r"(\d+\.|[-*]) ", line):
                items.append(re.sub(r"^(\d+\.|[-*]) ", "", line))
            else:
                items[-1] += f" {line.strip()}"
        tag = "ol" if item[1][0].isdigit() else "ul"
        shown = Markup("").join(Markup("<li>{}</li>").format(_inline(each)) for each in items)
        return Markup("<{}>{}</{}>").format(tag, shown, tag)
    return Markup("<p>{}</p>").format(_inline(" ".join(line.strip() for line in lines)))


def _inline(text: str) -> Markup:
    """Return text with code, emphasis and links. Links to other files of the documentation become text."""
    parts, at = list[Markup](), 0
    for match in _INLINE.finditer(text):
        parts.append(escape(text[at : match.start()]))
        code, strong, label, address = match.groups()
        if code is not None:
            parts.append(Markup("<code>{}</code>").format(code))
        elif strong is not None:
            parts.append(Markup("<strong>{}</strong>").format(strong))
        elif address.startswith("#"):
            parts.append(Markup('<a href="{}">{}</a>').format(address, _inline(label)))
        else:
            parts.append(_inline(label))
        at = match.end()
    return Markup("").join([*parts, escape(text[at:])])
