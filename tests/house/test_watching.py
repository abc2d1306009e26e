"""Alerts and dashboards ask for metrics and labels that exist, and lead to a page that says what to do."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml  # type: ignore[import-untyped]

from models.metrics import BY_NAME

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yml"
RULES_TEST = RULES.with_name("rules_test.yml")
DASHBOARDS = sorted((ROOT / "deploy/grafana").glob("*.json"))
RUNBOOK = ROOT / "docs/operations.md"
TARGET = {"job", "instance", "pod", "namespace"}
# Metrics of Prometheus itself.
ITS_OWN = {"ALERTS": {"alertname", "alertstate", "severity"}, "up": set[str]()}
# The smallest useful size of a panel of each type.
PANELS = {"stat", "timeseries", "table", "row"}


def metric_of(name: str) -> tuple[set[str], dict[str, tuple[str, ...]]] | None:
    """The labels that a series of that name has, and the values of those that have only some; None if there is none."""
    if name in ITS_OWN:
        return ITS_OWN[name] | TARGET, {}
    suffix = re.search(r"_(?:bucket|sum|count)$", name)
    metric = BY_NAME.get(name.removesuffix(suffix[0]) if suffix else name)
    if metric is None or (metric.kind == "histogram") != bool(suffix):
        return None
    values = {label: known for label, known in metric.labels.items() if known}
    return {*metric.labels, *TARGET, *({"le"} if name.endswith("_bucket") else ())}, values


def faults_of(expression: str, records: dict[str, set[str]]) -> list[str]:
    """What is wrong with it. `records`: recorded series that it may use, with their labels."""
    tree = promql.parse(expression)
    faults = [fault for selector in _selectors(tree) for fault in _selector_faults(selector, records)]

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.AggregateExpr) and node.modifier:
            missing = set(node.modifier.labels) - _labels_of(node.expr, records)
            faults.extend(f"{label} is no label of what is aggregated" for label in missing)
        if isinstance(node, promql.BinaryExpr) and node.modifier and node.modifier.matching:
            sides = [_labels_of(side, records) for side in (node.lhs, node.rhs)]
            faults.extend(
                f"{label} is no label of a side" for label in node.modifier.matching.labels if label not in sides[0] & sides[1]
            )

    promql.walk(tree, visit)
    return sorted(set(faults))


def _selector_faults(selector: Any, records: dict[str, set[str]]) -> list[str]:
    known = (records[selector.name], {}) if selector.name in records else metric_of(selector.name)
    if known is None:
        return [f"there is no metric {selector.name}"]
    labels, values = known
    faults = []
    for matcher in selector.matchers.matchers:
        if matcher.name not in labels:
            faults.append(f"{selector.name} has no label {matcher.name}")
        elif matcher.op in (promql.MatchOp.Equal, promql.MatchOp.Re) and matcher.name in values:
            never = set(matcher.value.split("|")) - set(values[matcher.name])
            faults += [f"{matcher.name} of {selector.name} is never {value}" for value in never]
    return faults


def _labels_of(node: promql.Expr, records: dict[str, set[str]]) -> set[str]:
    """The labels that what is selected below may have."""
    found: set[str] = set()
    for selector in _selectors(node):
        known = metric_of(selector.name)
        found |= records.get(selector.name, known[0] if known else set())
    return found


def _selectors(node: promql.Expr) -> list[Any]:
    found: list[Any] = []
    promql.walk(node, lambda one: found.append(one) if isinstance(one, promql.VectorSelector) else None)
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def records() -> dict[str, set[str]]:
    return {rule["record"]: set(TARGET) for rule in rules() if "record" in rule}


def panels(dashboard: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dashboard.read_text())["panels"]
    return found


def anchors() -> set[str]:
    headings = re.findall(r"^#+ (.*)$", RUNBOOK.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_queries_existing_metrics(rule: dict[str, Any]) -> None:
    assert faults_of(rule["expr"], records()) == []


@pytest.mark.parametrize("rule", [rule for rule in rules() if "alert" in rule], ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_where_it_is_told_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (page, anchor) == ("docs/operations.md", rule["alert"].lower())
    assert anchor in anchors()
    names = re.findall(r"\$labels\.(\w+)", "".join(rule["annotations"].values()))
    kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))))
    assert set(names) <= kept


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_queries_existing_metrics(dashboard: Path) -> None:
    asked = [(panel["title"], target["expr"]) for panel in panels(dashboard) for target in panel.get("targets", [])]
    asked += [("annotation", one["expr"]) for one in json.loads(dashboard.read_text())["annotations"]["list"]]
    faults = {title: faults for title, expression in asked if (faults := faults_of(expression, records()))}
    assert faults == {}
    assert len(asked) >= 10


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_loaded_anywhere_and_leads_to_what_to_do(dashboard: Path) -> None:
    board = json.loads(dashboard.read_text())
    assert board["uid"] == f"evalstore-{dashboard.stem.replace('-and-', '-')}"
    assert board["schemaVersion"] >= 39
    assert "id" not in board
    variables = {variable["name"]: variable["type"] for variable in board["templating"]["list"]}
    assert variables == {"datasource": "datasource", "runbook": "textbox"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["type"] in PANELS
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
        for link in panel.get("links", []):
            page, _, anchor = link["url"].partition("#")
            assert (page, anchor in anchors()) == ("${runbook}", True), link


def test_no_label_is_one_that_prometheus_gives_to_what_it_scrapes() -> None:
    """It would call ours `exported_…`, and what is asked by its name would be of the target."""
    assert [name for name, metric in BY_NAME.items() if TARGET & set(metric.labels)] == []


def test_a_metric_that_does_not_exist_is_reported() -> None:
    assert faults_of("sum(rate(evalstore_events_total[5m]))", {}) == []
    for wrong in (
        "evalstore_event_total",
        "evalstore_batch_events",
        "evalstore_queue_messages_count",
        'evalstore_events_total{kind="dead"}',
        'evalstore_events_total{outcome=~"applied|lost"}',
        "sum by (queue) (evalstore_events_total)",
        "max by (queue) (evalstore_consumers) > on (server) evalstore_server_up",
    ):
        assert faults_of(wrong, {}), wrong


def promtool() -> Iterator[Path]:
    """Where `.ci/run` puts it, or where it is installed."""
    for found in (ROOT / ".tools/promtool", shutil.which("promtool")):
        if found and Path(found).exists():
            yield Path(found)


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    program = next(promtool(), None)
    if program is None:
        pytest.skip("promtool is not here: Debian's package prometheus has it, and .ci/run fetches it")
    for verb, file in (("check", RULES), ("test", RULES_TEST)):
        done = subprocess.run(
            [program, verb, "rules", file], env={"PATH": os.defpath}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_in_the_tests_of_the_rules() -> None:
    tested = RULES_TEST.read_text()
    assert [rule["alert"] for rule in rules() if "alert" in rule and rule["alert"] not in tested] == []
