"""Content is kept as bytes, and any string or bytes come back exactly."""

from hypothesis import given
from hypothesis import strategies as st

from models.content import from_bytes, to_bytes

any_text = st.text(st.characters() | st.characters(categories=["Cs"]))
# Bytes that are nearly text: whole characters, halves of pairs, and what is left of broken ones.
nearly_text = st.lists(
    st.sampled_from([b"a", "é".encode(), "😀".encode(), b"\xed\xa0\xbd", b"\xed\xb8\x80", b"\xed\xa0", b"\xff", b"\0"])
).map(b"".join)


def joined(text: str) -> str:
    """`text` with each surrogate pair as the character it stands for."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


@given(any_text)
def test_any_string_comes_back(text: str) -> None:
    assert from_bytes(to_bytes(text)) == joined(text)


@given(st.binary() | nearly_text)
def test_any_bytes_come_back(data: bytes) -> None:
    back = from_bytes(data)
    assert (to_bytes(back) if isinstance(back, str) else back) == data


def test_a_surrogate_pair_is_the_character_it_stands_for() -> None:
    assert to_bytes("\ud83d\ude00") == to_bytes("😀") == "😀".encode()
    assert to_bytes("\ude00\ud83d\ude00\ud83d") == b"\xed\xb8\x80" + "😀".encode() + b"\xed\xa0\xbd"


def test_bytes_that_no_string_encodes_to_stay_bytes() -> None:
    for data in (b"\xff", bytes(range(256)), b"\xed\xa0\xbd\xed\xb8\x80", b"\xc0\x80", "😀".encode()[:3]):
        assert from_bytes(data) == data


def test_text_stays_text() -> None:
    for text in ("", "\0", "x\r\n\x1b[0m", "é😀", "\ud800", "\udfff\ud800"):
        assert from_bytes(to_bytes(text)) == text
