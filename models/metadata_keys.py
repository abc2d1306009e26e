"""Keys of the metadata that lists filter by with an index."""

from typing import Final

# Each index makes each stored evaluation that has the key a little dearer.
_KEYS: Final = 10
_CHARACTERS: Final = 200


def parse_keys(text: str | None) -> tuple[str, ...]:
    """Return the keys of a text that separates them by commas, each once. Raises ValueError."""
    keys = tuple(dict.fromkeys(key.strip() for key in (text or "").split(",") if key.strip()))
    if len(keys) > _KEYS or any(len(key) > _CHARACTERS or "\0" in key for key in keys):
        raise ValueError(f"expected up to {_KEYS} keys of up to {_CHARACTERS} characters")
    return keys
