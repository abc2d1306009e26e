"""The files around the code: what is in the repository, and that the several lists of one thing agree."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from models.settings import Settings

ROOT = Path(__file__).parents[2]
LOCKS = ["requirements.lock", "requirements-demo.lock", "deploy/requirements.lock"]
MAX_LINES = {"tests": 700, "": 450}
COMMANDS = {
    "worker": "dramatiq worker.tasks",
    "scheduler": "periodiq worker.tasks",
    "api": "python -m evalstore.api",
    "sinks": "evalstore sinks run",
}

# Split, so that this file does not contain the text that it forbids.
_ADDRESSES = re.compile(r"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|deb\.debian\.org|file:///[a-z]+/pypi", re.IGNORECASE)
_MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:root|work|home/\w+|Users/\w+)/\w")


def files() -> list[Path]:
    """What is in the repository, or would be with the next commit."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def texts() -> Iterator[tuple[str, str]]:
    """Each file that is text, by its path."""
    for path in files():
        try:
            yield str(path.relative_to(ROOT)), path.read_text()
        except UnicodeDecodeError:
            continue


def targets() -> dict[str, tuple[str, str]]:
    """What each target of the Makefile needs, and its recipe."""
    found = re.findall(r"^([\w-]+):(.*)\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {name: (needs, recipe) for name, needs, recipe in found}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_no_lock_that_names_registries_is_in_the_repository() -> None:
    forbidden = {"uv.lock", "package-lock.json", "poetry.lock", "pdm.lock", "Pipfile.lock", "yarn.lock"}
    assert [path for path in files() if path.name in forbidden] == []


def test_no_file_names_a_registry_or_a_place_on_somebodys_machine() -> None:
    found = [
        (name, match[0]) for name, text in texts() for match in [*_ADDRESSES.finditer(text), *_MACHINE_PATHS.finditer(text)]
    ]
    assert found == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_a_hash_for_every_name_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    required = requirements(text)
    assert required
    assert [
        name for name, requirement in required.items() if "--hash=sha256:" not in requirement or "==" not in requirement
    ] == []
    assert not re.search(r"://|^\s*-(?!-hash)", text, re.MULTILINE)


def test_the_image_is_built_from_the_versions_that_are_tested() -> None:
    tested = requirements((ROOT / "requirements.lock").read_text())
    shipped = requirements((ROOT / "deploy/requirements.lock").read_text())
    assert {name: pin for name, pin in shipped.items() if name in tested}.items() <= tested.items()
    optional = requirements((ROOT / "tests/environments/integrations.lock").read_text())
    for name in shipped.keys() - tested.keys():
        assert shipped[name].partition(" ")[0] == optional[name].partition(" ")[0]


def requirements(text: str) -> dict[str, str]:
    """Each requirement of a lock file, with its hashes, by its name."""
    joined = re.sub(r"#.*", "", text).replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in joined.splitlines() if line.strip()]
    return {re.split(r"[=\s\[;]", line, maxsplit=1)[0]: line for line in lines}


def test_every_file_of_code_can_be_read_in_one_sitting() -> None:
    for path in files():
        if path.suffix == ".py":
            name = path.relative_to(ROOT)
            limit = MAX_LINES.get(name.parts[0], MAX_LINES[""])
            assert len(path.read_text().splitlines()) <= limit, f"{name} has more than {limit} lines"


def test_what_the_documents_say_to_make_is_there_to_make() -> None:
    said = {
        target
        for name, text in texts()
        if name.endswith(".md") or name in {".ci/run", ".pre-commit-config.yaml"}
        for block in re.findall(r"```sh\n(.*?)```|`(make [\w-]+)`|((?:exec|entry:) make [\w-]+)", text, re.DOTALL)
        for target in re.findall(r"^\s*(?:exec |entry: )?make ([\w-]+)", "".join(block), re.MULTILINE)
    }
    assert said >= {"demo", "test", "test-fast", "setup", "check"}
    assert said - set(targets()) == set()


def test_the_tests_begin_with_style_types_and_layers() -> None:
    assert "check" in targets()["test"][0].split()
    recipe = targets()["check"][1]
    assert [tool for tool in ("ruff format --check", "ruff check", "mypy", "lint-imports") if tool not in recipe] == []


def test_every_room_is_typed_layered_and_shipped(project: dict[str, Any]) -> None:
    beside = {"tests", "bench", "docs", "examples", "deploy", "clients"}
    rooms = {
        path.relative_to(ROOT).parts[0]
        for path in files()
        if path.suffix == ".py" and len(path.relative_to(ROOT).parts) > 1 and path.stat().st_size
    } - beside
    tools = project["tool"]
    (contract,) = [one for one in tools["importlinter"]["contracts"] if one["type"] == "layers"]
    assert rooms - set(tools["importlinter"]["root_packages"]) == set()
    layered = {room.strip() for layer in contract["layers"] for room in layer.split("|")}
    inner = {f"evalstore.{path.stem}" for path in (ROOT / "evalstore").iterdir() if not path.name.startswith("__")}
    assert (rooms - {"evalstore"}) | inner - {"evalstore.examples"} == layered
    assert rooms - set(tools["mypy"]["files"]) == set()
    assert rooms - set(tools["hatch"]["build"]["targets"]["wheel"]["packages"]) == set()


def test_a_gateway_that_imports_tasks_loads_neither_the_servers_clients_nor_the_rooms_behind() -> None:
    look = "import sys, tasks; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert {"tasks", "models", "dramatiq", "pydantic"} <= loaded
    assert loaded & {"redis", "sqlalchemy", "alembic", "psycopg", "boto3", "rich", "worker", "evalstore.storage"} == set()


@pytest.mark.parametrize("status", [0, 1, 2])
def test_ci_runs_make_test_and_ends_as_it_ends(tmp_path: Path, status: int) -> None:
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "make $* in $PWD"\nexit {status}\n')
    # They exist, so that the script downloads none of them.
    programs = [tmp_path / name for name in ("promtool", "pgbouncer", "chromium")]
    for program in programs:
        program.write_text("#!/bin/sh\n")
    for program in (make, *programs):
        program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / ".ci/run"], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (status, f"make setup-integrations in {ROOT}\nmake test in {ROOT}\n")


def test_a_commit_is_checked_as_the_tests_check(project: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    assert [hook["entry"] for hook in hooks] == ["make check"]


def test_processes_are_started_alike_everywhere(compose: dict[str, Any]) -> None:
    procfile = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    assert procfile == COMMANDS
    assert {name: service["command"] for name, service in compose["services"].items() if name in COMMANDS} == COMMANDS
    readme = (ROOT / "README.md").read_text()
    assert [command for command in COMMANDS.values() if f"`{command.partition(' --host')[0]}`" not in readme] == []


def test_images_are_pinned_by_tag(compose: dict[str, Any]) -> None:
    images = [service["image"] for service in compose["services"].values()]
    images += re.findall(r"^FROM (\S+)", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert [image for image in images if not re.search(r":[\w.-]*\d+\.\d+[\w.-]*$", image)] == []


def test_containers_wait_for_what_they_need_and_come_back(compose: dict[str, Any]) -> None:
    services = compose["services"]
    servers = {name for name in services if name not in {*COMMANDS, "migrate"}}
    # Our images have health checks of their own. The collector's image has no program that could check.
    assert {name for name in services if "healthcheck" in services[name]} == servers - {"otel-collector"}
    assert "\nHEALTHCHECK " in (ROOT / "deploy/Dockerfile").read_text()
    assert {name: services[name]["restart"] for name in services if name != "migrate"} == dict.fromkeys(
        [*servers, *COMMANDS], "unless-stopped"
    )
    assert services["migrate"]["restart"] == "on-failure"
    for name in COMMANDS:
        conditions = {needed: how["condition"] for needed, how in services[name]["depends_on"].items()}
        assert conditions == {
            "migrate": "service_completed_successfully",
            "postgres": "service_healthy",
            "valkey": "service_healthy",
            "objects": "service_healthy",
        }


def test_containers_keep_their_data(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "--maxmemory ${VALKEY_MAXMEMORY" in command  # Without a limit, no alert would show that it fills up.
    mounted = {volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])}
    files = {source for source in mounted if source.startswith("./")}
    assert mounted - files == set(compose["volumes"])
    assert [source for source in files if not (ROOT / source).exists()] == []
    # Images from PostgreSQL 18 on keep data below this folder and refuse a volume further down.
    assert compose["services"]["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]


def test_passwords_in_the_compose_file_are_variables_and_nothing_listens_to_the_world(compose: dict[str, Any]) -> None:
    text = re.sub(r"#.*", "", (ROOT / "docker-compose.yml").read_text())
    secret = re.compile(r"password|secret|REDISCLI_AUTH|://:?\w*:(?!\d)", re.IGNORECASE)
    lines = [line.strip() for line in text.splitlines() if secret.search(line)]
    command = compose["services"]["valkey"]["command"]
    lines.append(command[command.index("--requirepass") + 1])
    assert [line for line in lines if not re.search(r"\$\{\w+:-evalstore\}", line)] == []
    ports = re.findall(r"^ +- (\S+):\d+$", text, re.MULTILINE)
    assert len(ports) == 6
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_the_containers_know_how_to_find_each_other(compose: dict[str, Any]) -> None:
    services = compose["services"]
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    ports = {name: config["port"] for job in scraped for config in job.get("dns_sd_configs", []) for name in config["names"]}
    defaults = Settings()
    assert ports == {
        "worker": defaults.metrics_port,
        "scheduler": defaults.scheduler_metrics_port,
        "sinks": defaults.sinks_metrics_port,
        "api": defaults.api_port,
    }
    environment = services["worker"]["environment"]
    assert environment["EVALSTORE_METRICS_HOST"] == "0.0.0.0"  # noqa: S104
    hosts = re.findall(r"(?:://|@)([a-z-]+):\d+", " ".join(environment.values()))
    hosts += re.findall(r"://([a-z-]+):\d+", "".join(path.read_text() for path in (ROOT / "deploy/grafana").rglob("*.yml")))
    assert set(hosts) - {"evalstore"} <= set(services)
    dashboards = {Path(volume.split(":")[0]).name for volume in services["grafana"]["volumes"] if ".json:" in volume}
    assert dashboards == {path.name for path in (ROOT / "deploy/grafana").glob("*.json")}


def test_the_image_builds_with_all_that_the_build_backend_needs() -> None:
    needed, look = set[str](), ["hatchling"]
    while look:
        name = look.pop()
        needed.add(name)
        requirements_of = [
            re.split(r"[^\w-]", text, maxsplit=1)[0] for text in metadata.requires(name) or [] if ";" not in text
        ]
        look += [found.lower() for found in requirements_of if found.lower() not in needed]
    (kept,) = re.findall(r"keep = /\^\(([\w|-]+)\)==/", (ROOT / "deploy/Dockerfile").read_text())
    assert set(kept.split("|")) == needed


def test_the_image_gets_every_package_that_the_wheel_has(project: dict[str, Any]) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    copied = {
        source
        for line in re.findall(r"^COPY (?!--)(.*) \S+$", dockerfile, re.MULTILINE)
        for source in line.split()
        if source not in {".", "./deploy/"}
    }
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"]} - copied == set()
    ignore = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    assert copied == {line[1:] for line in ignore if line.startswith("!")}


def test_a_migration_only_adds_so_that_the_release_before_works_on() -> None:
    first, *later = sorted((ROOT / "evalstore/storage/migrations/versions").glob("*.py"))
    takes = re.compile(
        r"\b(?:DROP|RENAME|SET NOT NULL|ALTER COLUMN(?! \w+ SET (?:STORAGE|DEFAULT))|TRUNCATE|op\.drop_\w+|op\.alter_column)\b",
        re.IGNORECASE,
    )
    assert first.name.startswith("0001")
    assert [(path.name, found) for path in later for found in takes.findall(path.read_text())] == []
    added = [line for path in later for line in path.read_text().splitlines() if re.search(r"ADD COLUMN .* NOT NULL", line)]
    assert [line for line in added if "DEFAULT" not in line] == []


def test_the_changelog_is_kept() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "\n## [Unreleased]\n" in text
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= allowed
