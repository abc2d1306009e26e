"""Where content goes is checked when the settings are read."""

import pytest

from models.addresses import parse_store_url
from models.errors import InvalidSettings
from models.settings import Settings


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("file:///srv/objects", ("file", "/srv/objects", "")),
        ("file://localhost/srv/objects/", ("file", "/srv/objects/", "")),
        ("file:///srv/with%20space%3F", ("file", "/srv/with space?", "")),
        ("s3://bucket", ("s3", "bucket", "")),
        ("s3://my.bucket-1/a/b/", ("s3", "my.bucket-1", "a/b")),
    ],
)
def test_a_good_address(url: str, parts: tuple[str, str, str]) -> None:
    assert parse_store_url(url) == parts
    read = Settings.from_environment({"EVALSTORE_OBJECT_STORE_URL": url, "EVALSTORE_ARCHIVE_URL": url})
    assert read.object_store_url == read.archive_url == url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file://objects", "absolute path"),
        ("file://objects/here", "absolute path"),
        ("file:objects", "file:///absolute/folder"),
        ("objects", "file:///absolute/folder"),
        ("/srv/objects", "file:///absolute/folder"),
        ("file:///", "below /"),
        ("file:///srv/../etc", "no .."),
        ("file:///srv/%2e%2e/etc", "no .."),
        ("file:///srv/a?b", "no ?"),
        ("gs://bucket", "s3://bucket/prefix"),
        ("s3://", "bucket's name"),
        ("s3:///prefix", "bucket's name"),
        ("s3://Bucket", "bucket's name"),
        ("s3://ab", "bucket's name"),
        ("s3://a..b", "bucket's name"),
        ("s3://192.168.0.1", "bucket's name"),
        ("s3://key:secret@bucket", "bucket's name"),
        ("s3://bucket/a//b", "empty parts"),
        ("s3://bucket/../b", "empty parts"),
    ],
)
def test_a_bad_address_is_refused_with_what_was_expected(url: str, expected: str) -> None:
    for name in ("EVALSTORE_OBJECT_STORE_URL", "EVALSTORE_ARCHIVE_URL"):
        with pytest.raises(InvalidSettings) as error:
            Settings.from_environment({name: url})
        assert str(error.value).startswith(f"{name}: ")
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("S3_ENDPOINT_URL", "host:9000"),
        ("S3_ENDPOINT_URL", "ftp://host"),
        ("S3_ENDPOINT_URL", "http://host:port"),
        ("S3_ENDPOINT_URL", "https://key:secret@host"),
        ("S3_STORAGE_CLASS", "standard"),
        ("S3_STORAGE_CLASS", "DEEP_ARCHIVE"),
        ("S3_SERVER_SIDE_ENCRYPTION", "yes"),
        ("S3_ADDRESSING_STYLE", "host"),
    ],
)
def test_other_settings_of_s3_are_checked_too(name: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^EVALSTORE_{name}: ") as error:
        Settings.from_environment({f"EVALSTORE_{name}": value})
    assert "secret" not in str(error.value)
