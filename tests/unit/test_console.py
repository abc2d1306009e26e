"""What the console makes of content: ranges, searches, colours, charts."""

import hashlib
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalstore.console import ansi, charts, content_view, highlight, rendering, timeline
from evalstore.storage.summaries import Summary, bin_of, histogram


def reader(data: bytes, piece: int = 1000) -> content_view.Read:
    def read(start: int, stop: int) -> Iterator[bytes]:
        for at in range(start, stop, piece):
            yield data[at : min(stop, at + piece)]

    return read


def text(shown: content_view.Range) -> str:
    return "\n".join(str(html) for _, html in shown.lines)


LINES = "".join(f"line {number}\n" for number in range(1, 20_001)).encode()


def test_ranges_forward_hold_every_line_once_with_its_number() -> None:
    read, at, line, seen = reader(LINES), 0, 1, []
    while at < len(LINES):
        shown = content_view.after(read, len(LINES), at, line)
        seen += shown.lines
        assert shown.next_line is not None
        at, line = shown.stop, shown.next_line
    assert [(number, str(html)) for number, html in seen] == [(number, f"line {number}") for number in range(1, 20_001)]


def test_ranges_backward_hold_every_line_once_with_its_number() -> None:
    read, at = reader(LINES), len(LINES)
    line: int | None = None
    seen: list[tuple[int | None, object]] = []
    while at > 0:
        shown = content_view.before(read, at, line)
        seen = [*shown.lines, *seen]
        at, line = shown.start, shown.first_line
    assert [(number, str(html)) for number, html in seen] == [(number, f"line {number}") for number in range(1, 20_001)]


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
def test_a_line_without_an_end_is_shown_in_parts(character: str) -> None:
    data, at, seen = (character * 200_000).encode(), 0, 0
    while at < len(data):
        shown = content_view.after(reader(data), len(data), at, 1)
        assert shown.next_line == 1
        assert "\ufffd" not in text(shown)
        assert "more characters in this line" in text(shown) or shown.stop == len(data)
        assert shown.stop > at
        seen += shown.stop - at
        at = shown.stop
    assert seen == len(data)
    last = content_view.before(reader(data), len(data), None)
    assert "\ufffd" not in text(last)


def test_a_line_is_found_by_its_number() -> None:
    start, line = content_view.find_line(reader(LINES), len(LINES), 15_000)
    assert (LINES[start : start + 11], line) == (b"line 15000\n", 15_000)
    assert content_view.find_line(reader(LINES), len(LINES), 1_000_000)[1] == 20_001
    assert content_view.find_line(reader(b""), 0, 7) == (0, 1)


@given(st.lists(st.text("ab\n", max_size=30), max_size=40).map("".join), st.integers(1, 9))
def test_a_search_finds_each_line_once_whatever_the_pieces(content: str, piece: int) -> None:
    data = content.encode()
    found = content_view.search(reader(data, piece), len(data), "ab", 0, 1)
    expected = [number for number, line in enumerate(content.split("\n"), 1) if "ab" in line]
    assert [match.line for match in found.found] == expected[:100]
    for match in found.found:
        assert data[match.start :].decode().split("\n")[0] == content.split("\n")[match.line - 1]


def test_a_search_goes_on_where_it_stopped() -> None:
    first = content_view.search(reader(LINES), len(LINES), "LINE", 0, 1)
    assert len(first.found) == 100
    second = content_view.search(reader(LINES), len(LINES), "line", first.searched, first.line)
    assert [match.line for match in second.found] == list(range(101, 201))


def test_colours_become_classes_and_other_sequences_stay_visible() -> None:
    style = ansi.Style()
    html = ansi.to_html("\x1b[1;31mred\x1b[0m <b>\x1b[2K\x1b]0;title\x07 \x1b[38;5;196mx\x1b[38;2;0;0;238my", style)
    assert '<span class="bold fg-1">red</span>' in html
    assert "&lt;b&gt;" in html
    assert "\x1b" not in html
    assert '<span class="fg-9">x</span>' in html
    assert '<span class="fg-4">y</span>' in html
    assert style.classes == "fg-4"


@given(st.text())
def test_no_text_becomes_markup(content: str) -> None:
    for html in (rendering.text(content), ansi.to_html(content, ansi.Style(), "a"), *highlight.lines(content, "python")):
        bare = str(html).replace("<bdi>", "").replace("</bdi>", "").replace("<mark>", "").replace("</mark>", "")
        while "<span" in bare:
            before, _, rest = bare.partition("<span")
            bare = before + rest.partition(">")[2]
        assert "<" not in bare.replace("</span>", "")
        assert "\u202e" not in bare
        assert "\x1b" not in bare


def test_code_keeps_its_lines() -> None:
    code = 'def f():\n    """Two\n    lines."""\n\n    return 1\n'
    assert len(highlight.lines(code, "python")) == len(code.split("\n")) - 1
    assert 'class="k"' in "".join(highlight.lines(code, "python"))
    assert "class=" not in "".join(highlight.lines(code, "no such language"))
    assert "more characters" in highlight.lines("x" * 5000, "python")[0]


def test_a_sparkline_has_gaps_where_samples_are_missing() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    samples = [(now - timedelta(hours=hours), {"n": hours}) for hours in (23, 22.9, 5)]
    assert charts.sparkline(samples, "n", now, "N").count("M") == 2
    assert "No samples" in charts.sparkline([], "n", now, "N")


def test_lanes_hold_the_events_of_each_attempt() -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    events = [
        {"type": "evaluation:started", "attempt": attempt, "event_id": attempt, "occurred_at": at + timedelta(seconds=attempt)}
        for attempt in (1, 2, 2)
    ]
    assert [(lane.attempt, lane.events) for lane in timeline.lanes(events)] == [(1, 1), (2, 2)]
    assert timeline.lanes([]) == []


@given(st.lists(st.floats(0.001, 1e9), max_size=200), st.integers(1, 40))
def test_a_histogram_counts_every_value(values: list[float], columns: int) -> None:
    summary = Summary()
    summary.durations.update(map(bin_of, values))
    found = histogram(summary.durations, columns)
    assert sum(count for _, _, count in found) == len(values)
    assert len(found) <= columns


def test_vendored_files_are_what_others_published() -> None:
    folder = files("evalstore.console") / "static"
    listed = {
        name: entry
        for entry in tomllib.loads((folder / "vendored.toml").read_text()).values()
        for name, entry in entry["sha256"].items()
    }
    assert listed
    for name, expected in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name
    own = {"console.js", "console.css", "favicon.svg", "vendored.toml"}
    assert {path.name for path in folder.iterdir()} == listed.keys() | own
