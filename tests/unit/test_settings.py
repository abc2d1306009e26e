"""Settings are read once, typed, and all that is wrong with them is told together."""

import os
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
import redis
from psycopg.conninfo import conninfo_to_dict

from evalstore.local import processes
from models import InvalidSettings
from models.addresses import parse_redis_url
from models.settings import Settings
from models.unknown_settings import unknown_settings

ADDRESS = "postgresql://user:hunter2@db/evalstore"


def refused(**environment: str) -> str:
    with pytest.raises(InvalidSettings) as error:
        Settings.from_environment(environment)
    return str(error.value)


def test_every_setting_has_a_default_and_an_empty_variable_counts_as_unset() -> None:
    defaults = Settings.from_environment({})
    assert defaults.database_url.get_secret_value() == "postgresql://localhost/evalstore"
    assert defaults.redis_url.get_secret_value() == "redis://localhost:6379/0"
    assert defaults.max_content_bytes == 104_857_600
    assert Settings.from_environment({f"EVALSTORE_{name.upper()}": "" for name in Settings.model_fields}) == defaults


def test_every_setting_says_what_it_is_and_who_reads_it() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert "read by" in field.description, name


def test_settings_come_from_the_environment() -> None:
    read = Settings.from_environment({"EVALSTORE_DATABASE_URL": ADDRESS, "EVALSTORE_MAX_CONTENT_BYTES": "5", "PATH": "/bin"})
    assert read.database_url.get_secret_value() == ADDRESS
    assert read.max_content_bytes == 5


@pytest.mark.parametrize(
    "address",
    [
        *("redis://h", "redis://:p@h:1/15", "rediss://h:6380", "unix:///run/redis.sock", "redis://[::1]:7/0"),
        *("redis://h/?db=3", "redis://u:p%40ss%2Fw%3A%25%23@h:1/0?protocol=3&client_name=x", "unix://:p@/run/redis.sock?db=3"),
        *("rediss://h?ssl_ca_certs=/etc/ca%20x.pem&ssl_cert_reqs=none", "rediss://h?ssl_check_hostname=false"),
        *("redis+sentinel://u:p%2F@h1:1,[::1]/my.primary/3?sentinel_username=a&sentinel_password=b", "redis+sentinel://h/n"),
        *("rediss+sentinel://h,i/n/0?ssl_cert_reqs=none", "redis+cluster://:p,q@h1:7000,h2", "rediss+cluster://h/0?protocol=2"),
    ],
)
def test_a_good_redis_address(address: str) -> None:
    assert Settings.from_environment({"EVALSTORE_REDIS_URL": address}).redis_url.get_secret_value() == address
    pool = redis.ConnectionPool.from_url(parse_redis_url(address).url)
    assert isinstance(pool.make_connection(), redis.connection.AbstractConnection)


@pytest.mark.parametrize(
    "address",
    [
        *("h:6379", "http://h", "redis://h:port", "redis://h:99999", "redis://h/queue", "redis://h/0/1", "redis://[::1/0"),
        *("redis://h:0", "unix://?db=1", "redis://:pa#ss@h:1/0", "redis://:pa/ss@h:1/0", "redis://:pa?ss@h:1/0"),
        *("redis://h?timeout=5", "redis://h?decode_responses=true", "redis://h?socket_timeout=0.1", "redis://h?ssl=true"),
        *("redis+sentinel://h:1", "redis+sentinel://h/a b/0", "redis+sentinel://h/n/x", "redis+sentinel://h:1,/n/0"),
        *("redis+sentinel://:pa/ss@h/n/0", "redis+sentinel://h/n/0?ssl_ca_certs=/x", "redis+cluster://h?sentinel_password=x"),
        *(
            "redis+cluster://h/1",
            "redis+cluster://h?db=1",
            "redis+cluster://h1:x,h2",
            "redis+cluster://:pa#s@h",
            "unix+cluster://h",
        ),
        *("redis://h?protocol=4", "redis://h?db=x", "redis://h?db=", "redis://h?ssl_ca_certs=/x", "rediss://h?ssl_cert_reqs=x"),
    ],
)
def test_a_bad_redis_address_is_named_and_not_repeated(address: str) -> None:
    message = refused(EVALSTORE_REDIS_URL=address)
    assert message.startswith("EVALSTORE_REDIS_URL: ")
    assert address not in message


def test_the_parts_of_an_address_of_several_servers() -> None:
    address = parse_redis_url("rediss+sentinel://u:p%2F@h1:1,[::1]/main/3?sentinel_password=s&protocol=3")
    assert address.nodes == (("h1", 1), ("::1", 26379))
    assert (address.url, address.primary) == ("rediss://u:p%2F@h1:1/3?protocol=3", "main")
    assert (address.sentinel_user, address.sentinel_password) == (None, "s")
    assert parse_redis_url("redis+cluster://h1,h2:7001").nodes == (("h1", 6379), ("h2", 7001))


def test_in_a_cluster_the_namespace_has_a_part_in_braces() -> None:
    cluster = {"EVALSTORE_REDIS_URL": "redis+cluster://h"}
    assert Settings.from_environment(cluster).redis_namespace == "{dramatiq}"
    assert Settings.from_environment({**cluster, "EVALSTORE_REDIS_NAMESPACE": "{x}:y"}).redis_namespace == "{x}:y"
    assert "a part in braces" in refused(**cluster, EVALSTORE_REDIS_NAMESPACE="x")
    assert "EVALSTORE_REDIS_NAMESPACE" not in refused(EVALSTORE_REDIS_URL="redis+cluster://")


def test_a_redis_option_that_is_spelt_wrong_or_not_for_this_scheme_is_told_so() -> None:
    assert "did you mean ssl_ca_certs?" in refused(EVALSTORE_REDIS_URL="rediss://h?ssl_ca_cert=/x")
    assert "ssl_ca_certs is an option of rediss://" in refused(EVALSTORE_REDIS_URL="redis://h?ssl_ca_certs=/x")
    assert "a password / is written %2F" in refused(EVALSTORE_REDIS_URL="redis://:pa#ss@h:1/0")


@pytest.mark.parametrize(
    "address",
    [
        *("postgres://db", "postgresql://u:p%40%2F@db:1/x?sslmode=verify-full", "postgresql:///x?host=/run/postgresql"),
        *(
            "postgresql://",
            "postgresql://%2Frun%2Fpostgresql/x",
            "postgresql://a:1,b,[::1]:3/x?target_session_attrs=read-write",
        ),
        *("postgresql://u@/x", "postgresql://u:p@db/x?options=-c%20search_path%3Da@b&application_name=x"),
    ],
)
def test_a_good_database_address(address: str) -> None:
    assert Settings.from_environment({"EVALSTORE_DATABASE_URL": address}).database_url.get_secret_value() == address
    assert conninfo_to_dict(address) or address == "postgresql://"


@pytest.mark.parametrize(
    "address",
    [
        *("db/evalstore", "mysql://db", "host=db", "postgresql:/db", "postgresql+psycopg://db/x"),
        *("postgresql://u:p@ss@db/x", "postgresql://u:p/ss@db/x", "postgresql://db:99999/x", "postgresql://u:p?ss@db/x"),
        *("postgresql://db:0/x", "postgresql://a:1,b:c/x", "postgresql://db/x?sslmode=requird"),
    ],
)
def test_a_bad_database_address_is_named_and_not_repeated(address: str) -> None:
    message = refused(EVALSTORE_DATABASE_URL=address)
    assert message.startswith("EVALSTORE_DATABASE_URL: ")
    assert address not in message


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many", "1e3", str(2**40)])
def test_a_bad_number_is_named(number: str) -> None:
    assert refused(EVALSTORE_MAX_CONTENT_BYTES=number).startswith("EVALSTORE_MAX_CONTENT_BYTES: ")


@pytest.mark.parametrize("around", ["\n", "\r\n", " ", "\t", "\u00a0"])
def test_white_space_around_a_value_does_not_count(around: str) -> None:
    given = {
        "EVALSTORE_DATABASE_URL": ADDRESS,
        "EVALSTORE_REDIS_URL": "redis://h:1/0",
        "EVALSTORE_OBJECT_STORE_URL": "file:///data/objects",
        "EVALSTORE_S3_ENDPOINT_URL": "http://h:1",
        "EVALSTORE_SPOOL_DIR": "/var/spool",
        "EVALSTORE_METRICS_HOST": "::1",
        "EVALSTORE_LOG_FORMAT": "json",
        "EVALSTORE_MAX_CONTENT_BYTES": "5",
    }
    spaced = {name: around + value + around for name, value in given.items()}
    assert Settings.from_environment(spaced) == Settings.from_environment(given)
    assert Settings.from_environment({"EVALSTORE_OBJECT_STORE_URL": around}).object_store_url is None


@pytest.mark.parametrize("control", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85"])
@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_control_character_inside_any_value_is_refused(name: str, control: str) -> None:
    field = f"EVALSTORE_{name.upper()}"
    assert refused(**{field: f"/a{control}b"}) == f"{field}: control characters are not allowed"


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e400", "infinity"])
def test_an_infinite_number_or_none_is_refused_for_every_setting(number: str) -> None:
    names = [f"EVALSTORE_{name.upper()}" for name in numbers()]
    assert all(f"{name}: expected a" in refused(**{name: number}) for name in names)


def numbers() -> dict[str, list[float]]:
    """The upper limits of each setting that is a number."""
    fields = Settings.model_fields.items()
    return {
        name: [limit.le for limit in field.metadata if hasattr(limit, "le")]
        for name, field in fields
        if {int, float} & {field.annotation, *get_args(field.annotation)}
    }


def test_every_number_has_an_upper_limit_that_clocks_can_reach() -> None:
    assert len(numbers()) > 15
    for name, limits in numbers().items():
        assert len(limits) == 1, name
        if name.endswith("_s"):
            assert limits[0] < threading.TIMEOUT_MAX / 2
            assert datetime.now(UTC) - timedelta(seconds=2 * limits[0])
        if name.endswith("_days"):
            assert datetime.now(UTC) - timedelta(days=2 * limits[0])


def test_all_faults_are_reported_together() -> None:
    message = refused(
        EVALSTORE_DATABASE_URL="mysql://user:hunter2@db",
        EVALSTORE_REDIS_URL="http://:hunter2@r",
        EVALSTORE_MAX_CONTENT_BYTES="x",
    )
    for name in ("EVALSTORE_DATABASE_URL", "EVALSTORE_REDIS_URL", "EVALSTORE_MAX_CONTENT_BYTES"):
        assert f"{name}: " in message
    assert "hunter2" not in message


def test_a_process_whose_settings_are_wrong_says_which_and_nothing_else() -> None:
    wrong = {"EVALSTORE_REDIS_URL": "foo", "EVALSTORE_BATCH_EVENTS": "many"}
    for program in (["-c", "import worker.tasks"], ["-m", "evalstore.api"], ["-m", "uvicorn", "evalstore.api.app:app"]):
        done = subprocess.run([sys.executable, *program], env=os.environ | wrong, capture_output=True, text=True, check=False)
        (line,) = done.stderr.splitlines()
        assert re.fullmatch("EVALSTORE_REDIS_URL: .*; EVALSTORE_BATCH_EVENTS: expected an integer", line)
        assert done.returncode == 2


def test_an_address_that_libpq_does_not_take_is_told_at_once_instead_of_at_each_event() -> None:
    wrong = {"EVALSTORE_DATABASE_URL": "postgresql://u:hunter2@localhost/x?sslmod=require"}
    for program in (["-c", "import worker.tasks"], ["-m", "evalstore.api"], ["-m", "uvicorn", "evalstore.api.app:app"]):
        done = subprocess.run([sys.executable, *program], env=os.environ | wrong, capture_output=True, text=True, check=False)
        assert done.stderr == "EVALSTORE_DATABASE_URL: expected an address that libpq understands\n"
        assert done.returncode == 2


def test_secrets_never_print() -> None:
    read = Settings.from_environment({"EVALSTORE_DATABASE_URL": ADDRESS, "EVALSTORE_REDIS_URL": "redis://:hunter2@r"})
    assert "hunter2" not in f"{read} {read!r} {read.model_dump()} {read.model_dump_json()}"


def test_a_variable_that_is_spelt_like_a_setting_is_told_with_it_and_no_other_is() -> None:
    told = unknown_settings(
        {
            "EVALSTORE_SPOOLDIR": "/var/spool/evalstore",
            "EVALSTORE_DATABASE_URI": "",
            "Evalstore_Redis_Url": "redis://h",
            "EVALSTORE_redis_url": "redis://h",  # this one is read
            "EVALSTORE_OWNED_BY": "the platform team",
            "EVALSTORE_ACTOR": "ada",
            "EVALSTORE_API_URL": "http://localhost:8086",
            "EVALSTORE_API_SERVICE_HOST": "10.0.0.1",  # Kubernetes, for a service named evalstore-api
            "EVALSTORE_API_SERVICE_PORT_HTTP": "80",
            "EVALSTORE_API_PORT_80_TCP_ADDR": "10.0.0.1",
            "REDIS_URL": "redis://h",
        }
    )
    assert told == [
        "EVALSTORE_DATABASE_URI is no setting; did you mean EVALSTORE_DATABASE_URL?",
        "EVALSTORE_SPOOLDIR is no setting; did you mean EVALSTORE_SPOOL_DIR?",
        "Evalstore_Redis_Url is no setting; did you mean EVALSTORE_REDIS_URL?",
    ]


def test_no_name_that_processes_find_in_their_environment_is_taken_for_a_misspelling() -> None:
    assert (
        unknown_settings(
            {**os.environ, processes.MARK: "/data", **{f"EVALSTORE_{name.upper()}": "" for name in Settings.model_fields}}
        )
        == []
    )


@pytest.mark.parametrize(
    "start",
    [
        "import worker.tasks",
        "import sys; sys.argv = ['evalstore', 'cron', '--help']; from evalstore.cli.entry import main; main()",
        "from tasks.broker import broker; broker(); broker.cache_clear(); broker()",
    ],
)
def test_each_process_tells_once_of_a_misspelt_setting(start: str) -> None:
    given = {**os.environ, "EVALSTORE_SPOOLDIR": "/var/spool/evalstore", "EVALSTORE_METRICS_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", start], env=given, capture_output=True, text=True, check=True)
    assert done.stderr.count("EVALSTORE_SPOOLDIR is no setting; did you mean EVALSTORE_SPOOL_DIR?") == 1
