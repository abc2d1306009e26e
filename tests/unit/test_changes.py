"""Changes on their way to clients, without a server."""

import pytest

from evalstore.api import change_feed
from evalstore.api.change_feed import ChangeFilter, Subscription, changes_of
from evalstore.client.event_stream import parse
from evalstore.storage.outbox_tail import Position, TailRow

LINES = [f'{{"type":"storage:evaluation:updated","eval_id":"e{number}","version":1,"status":"running"}}' for number in (1, 2)]
BODY = "\n".join(LINES)


def subscription(after: tuple[int, int] = (0, 0)) -> Subscription:
    return Subscription(ChangeFilter(), Position(1, 0, 0.0), 0, after)


def test_an_event_is_told_again_only_from_its_own_place_on() -> None:
    changes = list(changes_of(TailRow(7, BODY, None), 100.0))
    assert [change_feed.encode(change.resume) for change in changes] == ["7-1-100", "7-2-100"]
    resumed = subscription(after=(7, 1))
    for change in changes:
        resumed.offer(change)
    assert [change.number for change in resumed.unsent] == [2]


def test_behind_a_gap_a_client_resumes_at_the_gap() -> None:
    changes = changes_of(TailRow(7, BODY, 5), 100.0)
    assert [change_feed.encode(change.resume) for change in changes] == ["5-0-100", "5-0-100"]


def test_a_stream_that_is_not_read_is_ended_and_keeps_what_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_feed, "MOST_UNSENT", 3)
    slow = subscription()
    for row_id in range(1, 5):
        for change in changes_of(TailRow(row_id, BODY, None), 0.0):
            slow.offer(change)
    assert slow.is_cut
    assert [(change.row_id, change.number) for change in slow.unsent] == [(1, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_messages_are_parsed_however_the_network_cuts_them(size: int) -> None:
    first = ": connected\r\nid: 1\r\n\r\nevent: a\ndata: \u2028é\ndata:b\nid: 2\n\n"
    text = f"{first}: heartbeat\nid: 3\n\nevent: c\ndata: cut off\nid: 4\n".encode()
    messages = list(parse(text[at : at + size] for at in range(0, len(text), size)))
    assert messages == [("message", "", "1"), ("a", "\u2028é\nb", "2"), ("message", "", "3")]
