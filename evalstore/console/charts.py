"""Small charts as SVG. Colours come from the style sheet, because a page may hold no styles."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from markupsafe import Markup

_BUCKETS: Final = 96
_DAY: Final = timedelta(days=1)
_HEIGHT: Final = 28


def sparkline(samples: Sequence[Any], name: str, until: datetime, title: str) -> Markup:
    """Return the course of a number over the day before `until`: of each quarter of an hour the highest, gaps without samples.

    `samples`: pairs of a time and the numbers.
    """
    highest: list[float | None] = [None] * _BUCKETS
    for at, numbers in samples:
        bucket = int((at - (until - _DAY)) / _DAY * _BUCKETS)
        value = numbers.get(name)
        if 0 <= bucket < _BUCKETS and isinstance(value, int | float):
            highest[bucket] = max(value, highest[bucket] or 0.0)
    top = max((value for value in highest if value is not None), default=0.0)
    if not any(value is not None for value in highest):
        return Markup('<p class="hint spark">No samples yet.</p>')
    path, is_drawn = [], False
    for at, value in enumerate(highest):
        if value is not None:
            y = _HEIGHT - 2 - (value / top * (_HEIGHT - 4) if top else 0)
            path.append(f"{'L' if is_drawn else 'M'}{at} {y:.1f}h1")
        is_drawn = value is not None
    label = f"{title}, last 24 hours, at most {top:,.4g}"
    return Markup(
        '<svg class="spark" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}"><title>{}</title>'
        '<path d="{}"/></svg>'
    ).format(_BUCKETS, _HEIGHT, label, label, "".join(path))


def bars(counts: Sequence[tuple[str, float]], title: str) -> Markup:
    """Return a histogram: pairs of a label and a count, at least one. The labels of the first and the last column are shown."""
    top = max((count for _, count in counts), default=0) or 1
    width = len(counts) or 1
    columns = Markup("").join(
        Markup('<rect x="{}" y="{:.1f}" width=".9" height="{:.1f}"><title>{}: {:,.0f}</title></rect>').format(
            at, 40 - count / top * 38, count / top * 38, label, count
        )
        for at, (label, count) in enumerate(counts)
    )
    return Markup(
        '<svg class="bars" viewBox="0 0 {} 40" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(width, title, columns)


def shares(counts: Sequence[tuple[str, int]], title: str) -> Markup:
    """Return a bar whose parts are as long as their counts. The name of each part is its class."""
    total = sum(count for _, count in counts) or 1
    parts, x = [], 0.0
    for name, count in counts:
        width = count / total * 100
        parts.append(
            Markup('<rect class="{}" x="{:.3f}" y="0" width="{:.3f}" height="4"><title>{}: {:,}</title></rect>').format(
                f"part-{name}", x, width, name.replace("_", " "), count
            )
        )
        x += width
    label = f"{title}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts if count)
    return Markup(
        '<svg class="shares" viewBox="0 0 100 4" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(label, Markup("").join(parts))
