"""Settings are read once, typed, and all that is wrong with them is told together."""

import os
import re
import subprocess
import sys

import pytest
import redis
from psycopg.conninfo import conninfo_to_dict

from evalstore.local import processes
from models import InvalidSettings
from models.settings import Settings, unknown_settings

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
    ],
)
def test_a_good_redis_address(address: str) -> None:
    assert Settings.from_environment({"EVALSTORE_REDIS_URL": address}).redis_url.get_secret_value() == address
    pool = redis.ConnectionPool.from_url(address)
    assert isinstance(pool.make_connection(), redis.connection.AbstractConnection)


@pytest.mark.parametrize(
    "address",
    [
        *("h:6379", "http://h", "redis://h:port", "redis://h:99999", "redis://h/queue", "redis://h/0/1", "redis://[::1/0"),
        *("redis://h:0", "unix://?db=1", "redis://:pa#ss@h:1/0", "redis://:pa/ss@h:1/0", "redis://:pa?ss@h:1/0"),
        *("redis://h?timeout=5", "redis://h?decode_responses=true", "redis://h?socket_timeout=0.1", "redis://h?ssl=true"),
        *("redis://h?protocol=4", "redis://h?db=x", "redis://h?db=", "redis://h?ssl_ca_certs=/x", "rediss://h?ssl_cert_reqs=x"),
    ],
)
def test_a_bad_redis_address_is_named_and_not_repeated(address: str) -> None:
    message = refused(EVALSTORE_REDIS_URL=address)
    assert message.startswith("EVALSTORE_REDIS_URL: ")
    assert address not in message


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
