"""A sinks file is read whole or refused, with every fault at its line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evalstore.sinks import config, kafka
from evalstore.sinks.protocol import Batch, KeepsCursor, SinkEvent
from models.errors import InvalidSettings
from models.settings import settings

KINDS = ", ".join(sorted(config._BUILTIN))
GOOD = '[main]\ntype = "kafka"\nbootstrap_servers = "k:9092"\ntopic = "t"\n'


def faults(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "sinks.toml"
    path.write_text(text)
    with pytest.raises(InvalidSettings) as raised:
        config.load(path, settings())
    return str(raised.value).replace(str(path), "FILE").splitlines()


def test_a_table_is_a_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sinks.toml"
    monkeypatch.setenv("KAFKA_PASSWORD", "secret")
    sasl = (
        'security_protocol = "sasl_ssl"\nsasl_mechanism = "PLAIN"\nsasl_username = "u"\nsasl_password_env = "KAFKA_PASSWORD"\n'
    )
    path.write_text(GOOD + sasl + GOOD.replace("main", "twice") + "transactional = true\n")
    first, second = config.load(path, settings())
    assert (first.name, second.name) == ("main", "twice")
    assert isinstance(first.options, kafka.KafkaOptions)
    assert first.options.client()["sasl.password"] == "secret"
    assert "secret" not in repr(first.options)
    assert [isinstance(one.create(one.name), KeepsCursor) for one in (first, second)] == [False, True]


def test_all_faults_are_told_with_line_and_key(tmp_path: Path) -> None:
    text = GOOD + 'topik = "x"\nbatch_events = "many"\n\n[two]\ntype = "kafca"\n\n["a b"]\ntype = "kafka"\n'
    assert faults(tmp_path, text) == [
        "FILE:5: [main] topik: there is no such key; did you mean topic?",
        "FILE:6: [main] batch_events: expected an integer",
        "FILE:9: [two] type: there is no type of this name; did you mean kafka?; there are " + KINDS,
        "FILE:11: [a b] a sink's name is 1 to 100 of A-Z a-z 0-9 . _ -",
        "FILE:11: [a b] bootstrap_servers: required",
        "FILE:11: [a b] topic: required",
    ]


_CLEAR = "a secret stands in no file: give sasl_password_env or sasl_password_file"


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ('sasl_password = "s3cret"\n', f"FILE:5: [main] sasl_password: {_CLEAR}"),
        ('sasl_password_env = "NOT_SET"\n', "FILE:1: [main] the environment variable NOT_SET is not set"),
        ('security_protocol = "sasl_ssl"\n', "FILE:5: [main] security_protocol: needs sasl_mechanism and sasl_username"),
        ("[main]\n", "EVALSTORE_SINKS_FILE: FILE: Cannot declare ('main',) twice (at line 5, column 6), key main"),
        ("topic = 1\n", "EVALSTORE_SINKS_FILE: FILE: Cannot overwrite a value (at line 5, column 10), key topic"),
    ],
)
def test_a_fault_shows_no_secret(tmp_path: Path, more: str, fault: str) -> None:
    assert faults(tmp_path, GOOD + more) == [fault]
    assert "s3cret" not in fault


_CLICKHOUSE = '[c]\ntype = "clickhouse"\nurl = "https://c:8443"\n'
_BIGQUERY = '[b]\ntype = "bigquery"\nproject = "p"\ndataset = "d"\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            _CLICKHOUSE + 'password = "s3cret"\n',
            "4: [c] password: a secret stands in no file: give password_env or password_file",
        ),
        (_CLICKHOUSE + 'password_env = "NOT_SET"\n', "1: [c] the environment variable NOT_SET is not set"),
        (_CLICKHOUSE.replace("https", "tcp"), "3: [c] url: expected an address like https://clickhouse.example:8443"),
        (_CLICKHOUSE + 'ssl_ca_file = "/none.pem"\n', "4: [c] ssl_ca_file: there is no file /none.pem"),
        (_CLICKHOUSE + 'tabel = "t"\n', "4: [c] tabel: there is no such key; did you mean table?"),
        (_BIGQUERY + 'credentials_file = "/none"\n', "5: [b] credentials_file: there is no file /none"),
        (
            _BIGQUERY + 'storage_endpoint = "h:1"\n',
            "5: [b] storage_endpoint: goes together with an api_endpoint that begins with http://",
        ),
    ],
)
def test_keys_of_databases_are_checked(tmp_path: Path, text: str, fault: str) -> None:
    assert faults(tmp_path, text) == [f"FILE:{fault}"]


def test_a_password_in_an_address_is_refused(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, GOOD.replace("k:9092", "kafka://u:s3cret@k:9092"))
    assert fault == "FILE:3: [main] bootstrap_servers: a password stands in no file"


def test_what_is_missing_or_no_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="No such file"):
        config.load(tmp_path / "none", settings())
    assert faults(tmp_path, "a = 1\n")[0].endswith("[a] expected a table for each sink, like [kafka-main]")
    assert faults(tmp_path, "[a]\n") == ["FILE:1: [a] type: missing; there are " + KINDS]


@pytest.mark.parametrize(("fields", "text"), [({"a": "é"}, '{"a":"é"}'.encode()), ({"a": "\ud800"}, b'{"a":"\\ud800"}')])
def test_an_event_is_json_whatever_its_content_holds(fields: dict[str, Any], text: bytes) -> None:
    event = SinkEvent("e", "i", "t", fields)
    assert event.json == text
    assert list(Batch([event])) == [event] == list(Batch([event])[:1])


def test_a_kind_of_sink_loads_its_library_when_a_sink_is_made() -> None:
    code = "import sys, evalstore.sinks.config; print({'river', 'confluent_kafka', 'httpcore'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
