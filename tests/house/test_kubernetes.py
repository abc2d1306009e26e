"""The manifests are what Kubernetes takes, fit together, and fit what they start."""

import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from evalstore.api import health_routes
from evalstore.api.__main__ import GRACE_S
from evalstore.sinks.runner import STOP_S
from tasks.keys import QUEUE, Keys
from tests.house.test_watching import faults_of, records
from worker.heartbeat import STOP_WITHIN_S

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kubernetes"
VERSION = "1.33"  # The oldest version that providers still offer. Later versions accept the same.
Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    files = [path for path in sorted(FOLDER.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [found for path in files for found in yaml.safe_load_all(path.read_text())]


def of(kind: str) -> list[Manifest]:
    return [found for found in manifests() if found["kind"] == kind]


def workloads() -> list[Manifest]:
    return [*of("Deployment"), *of("Job")]


def pod(workload: Manifest) -> Manifest:
    found: Manifest = workload["spec"]["template"]["spec"]
    return found


def container(workload: Manifest) -> Manifest:
    (found,) = pod(workload)["containers"]
    assert isinstance(found, dict)
    return found


def name(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def selected(labels: Manifest) -> list[str]:
    """The workloads whose pods a selector finds."""
    wanted = labels.get("matchLabels", {}).items()
    among = {one["key"]: one["values"] for one in labels.get("matchExpressions", [])}
    return [
        found["metadata"]["name"]
        for found in workloads()
        if wanted <= (has := found["spec"]["template"]["metadata"]["labels"]).items()
        and all(has.get(key) in values for key, values in among.items())
    ]


@pytest.mark.parametrize("manifest", manifests(), ids=name)
def test_a_manifest_is_one_that_kubernetes_takes(manifest: Manifest) -> None:
    if manifest["apiVersion"].split("/")[0] in {"keda.sh", "monitoring.coreos.com"}:
        pytest.skip("its schema is not Kubernetes's own")
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_a_manifest_that_it_would_refuse_is_found_out() -> None:
    (service,) = of("Service")
    service["spec"]["ports"][0]["targetprt"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, VERSION, strict=True)


def test_all_files_are_applied_but_the_migration_which_comes_first_and_the_example() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert {path.name for path in FOLDER.glob("*.yaml")} - set(listed) == {
        *("kustomization.yaml", "migrate.yaml", "secret.example.yaml")
    }


@pytest.mark.parametrize("workload", workloads(), ids=name)
def test_a_pod_runs_what_there_is_with_few_rights(workload: Manifest) -> None:
    release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    one, whole = container(workload), pod(workload)
    assert one["image"] == f"evalstore:{release}"
    assert whole["securityContext"]["runAsNonRoot"]
    assert str(whole["securityContext"]["runAsUser"]) in (ROOT / "deploy/Dockerfile").read_text()
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # Otherwise the service evalstore-api would set EVALSTORE_API_PORT to an address.
    assert whole["enableServiceLinks"] is False
    assert whole["automountServiceAccountToken"] is False
    assert set(one["resources"]) == {"requests", "limits"}
    assert {mount["name"] for mount in one["volumeMounts"]} == {volume["name"] for volume in whole["volumes"]}
    assert {"name": "tmp", "mountPath": "/tmp"} in one["volumeMounts"]  # noqa: S108
    procfile = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    role = workload["metadata"]["labels"]["app.kubernetes.io/component"]
    started = " ".join(one["args"])
    expected = {"api": "python -m evalstore.api", "migrate": "evalstore migrate"}.get(role) or procfile[role]
    assert started.startswith(expected)


@pytest.mark.parametrize("workload", of("Deployment"), ids=name)
def test_a_deployment_finds_its_own_pods_and_no_others(workload: Manifest) -> None:
    assert selected(workload["spec"]["selector"]) == [workload["metadata"]["name"]]
    for spread in pod(workload)["topologySpreadConstraints"]:
        assert selected(spread["labelSelector"]) == [workload["metadata"]["name"]]


def test_each_deployment_has_a_disruption_budget() -> None:
    covered = [found for budget in of("PodDisruptionBudget") for found in selected(budget["spec"]["selector"])]
    assert sorted(covered) == sorted(found["metadata"]["name"] for found in of("Deployment"))


@pytest.mark.parametrize("workload", of("Deployment"), ids=name)
def test_probes_use_existing_paths_and_commands(workload: Manifest) -> None:
    one = container(workload)
    routes = {getattr(route, "path", "") for route in health_routes.router.routes}
    beside = (ROOT / "evalstore/telemetry/exposition.py").read_text()
    ports = {port["name"] for port in one["ports"]}
    for kind, asks in (("startupProbe", "live"), ("livenessProbe", "live"), ("readinessProbe", "ready")):
        asked = one[kind]["httpGet"]
        assert asked["path"] == f"/health/{asks}"
        assert asked["path"] in routes if asked["port"] == "http" else f'"{asked["path"]}"' in beside
        assert asked["port"] in ports


def test_nothing_is_killed_before_it_has_stopped() -> None:
    needs = {"worker": STOP_WITHIN_S, "scheduler": STOP_WITHIN_S, "api": GRACE_S + 5, "sinks": STOP_S}
    for workload in of("Deployment"):
        role = workload["metadata"]["labels"]["app.kubernetes.io/component"]
        assert pod(workload)["terminationGracePeriodSeconds"] > needs[role]


def test_every_object_that_a_manifest_refers_to_exists() -> None:
    secrets = {found["metadata"]["name"]: set(found["stringData"]) for found in of("Secret")}
    config = {found["metadata"]["name"] for found in of("ConfigMap")}
    for workload in workloads():
        one = container(workload)
        assert {source["configMapRef"]["name"] for source in one["envFrom"]} <= config
        given = [variable["valueFrom"]["secretKeyRef"] for variable in one["env"] if "valueFrom" in variable]
        assert [key for key in given if key["key"] not in secrets[key["name"]]] == []
        for volume in pod(workload)["volumes"]:
            if "secret" in volume:
                keys = {Path(variable["value"]).name for variable in one["env"] if "value" in variable}
                assert keys == secrets[volume["secret"]["secretName"]]
    (authentication,) = of("TriggerAuthentication")
    for reference in authentication["spec"]["secretTargetRef"]:
        assert reference["key"] in secrets[reference["name"]]


def test_the_settings_that_the_migration_refers_to_are_there_before_it() -> None:
    """Its pod would wait for them without end, and the command after it for the job."""
    typed = (FOLDER / "README.md").read_text()
    (job,) = of("Job")
    settings = [source["configMapRef"]["name"] for source in container(job)["envFrom"]]
    assert settings == [found["metadata"]["name"] for found in yaml.safe_load_all((FOLDER / "config.yaml").read_text())]
    assert 0 < typed.find("apply -f deploy/kubernetes/config.yaml") < typed.find("apply -f deploy/kubernetes/migrate.yaml")


def test_who_checks_a_server_s_certificate_says_by_what() -> None:
    """Else libpq looks for a file in the user's home, and the image's user has none."""
    (address,) = [found["stringData"]["database-url"] for found in of("Secret") if "database-url" in found["stringData"]]
    assert "sslmode=verify-full&sslrootcert=" in address


def test_services_and_monitors_find_ports_of_their_names() -> None:
    (service,), (pods,), (services,) = of("Service"), of("PodMonitor"), of("ServiceMonitor")
    by_name = {found["metadata"]["name"]: {port["name"] for port in container(found)["ports"]} for found in of("Deployment")}
    assert selected({"matchLabels": service["spec"]["selector"]}) == ["evalstore-api"]
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= by_name["evalstore-api"]
    assert sorted(selected(pods["spec"]["selector"])) == ["evalstore-scheduler", "evalstore-sinks", "evalstore-worker"]
    for endpoint in pods["spec"]["podMetricsEndpoints"]:
        assert all(endpoint["port"] in by_name[found] for found in selected(pods["spec"]["selector"]))
    assert services["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {endpoint["port"] for endpoint in services["spec"]["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    settings = next(found["data"] for found in of("ConfigMap"))
    listens = {found: str(container(one)["ports"][0]["containerPort"]) for one in of("Deployment") for found in [name(one)]}
    assert listens == {
        "Deployment/evalstore-worker": settings["EVALSTORE_METRICS_PORT"],
        "Deployment/evalstore-scheduler": settings["EVALSTORE_SCHEDULER_METRICS_PORT"],
        "Deployment/evalstore-sinks": settings["EVALSTORE_SINKS_METRICS_PORT"],
        "Deployment/evalstore-api": settings["EVALSTORE_API_PORT"],
    }


def test_workers_are_scaled_by_what_waits_and_for_how_long() -> None:
    (scaled,) = of("ScaledObject")
    (worker,) = [found for found in of("Deployment") if found["metadata"]["name"] == scaled["spec"]["scaleTargetRef"]["name"]]
    assert "replicas" not in worker["spec"]  # Replicas would fight with the autoscaler.
    redis, prometheus = scaled["spec"]["triggers"]
    assert redis["metadata"]["listName"] == Keys.of("dramatiq", QUEUE).bodies
    assert faults_of(prometheus["metadata"]["query"], records()) == []
    assert "evalstore_queue_oldest_age_seconds" in prometheus["metadata"]["query"]
    assert all(isinstance(value, str) for trigger in scaled["spec"]["triggers"] for value in trigger["metadata"].values())
    (authentication,) = of("TriggerAuthentication")
    assert redis["authenticationRef"]["name"] == authentication["metadata"]["name"]


def test_the_alert_rules_are_the_spec_of_a_prometheus_rule() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert re.search(r"sed 's/\^/  /' deploy/prometheus/rules\.yml", readme)
    assert set(yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())) == {"groups"}
