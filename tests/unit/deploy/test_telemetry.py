"""Figures, dashboards, alert rules and their page belong together: what one names, the others have.

python -m tests.unit.deploy.test_telemetry      writes the table of docs/telemetry.md anew
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import services.core.telemetry.figures
import services.core.telemetry.process
import services.gateway.figures
import services.inference.figures
import services.ingest.figures
import services.scanner.figures
import services.trainer.figures
from services.core.telemetry.metrics import FAMILIES, Family
from tests.unit.deploy.chart import CHART, NAMESPACE, ROOT, container, example, of_kind, render, rendered, workloads
from tests.unit.deploy.test_network import KEDA, allows, pods

HERE = ROOT / "deploy/telemetry"
PAGE = ROOT / "docs/telemetry.md"
RUNBOOKS = {path.name for path in (ROOT / "docs/runbooks").glob("*.md")} - {"README.md"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
TARGET = {"instance", "job", "app_kubernetes_io_part_of", "app_kubernetes_io_component"}
"""Labels that Prometheus gives to whatever it scrapes."""
OTHERS = {
    "up": set(),
    "process_resident_memory_bytes": set(),
    "kubelet_volume_stats_available_bytes": {"persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"persistentvolumeclaim"},
}
"""Figures that are not ours, and their labels."""
MODULES = (
    services.core.telemetry.figures,
    services.core.telemetry.process,
    services.ingest.figures,
    services.scanner.figures,
    services.trainer.figures,
    services.inference.figures,
    services.gateway.figures,
)
_TITLES = ("Every service", "Every process", "Ingest", "Scanner", "Trainer", "Inference", "Gateway")
_WORDS = {"and", "by", "on", "sum", "max", "min", "rate", "increase", "changes", "time", "le", "histogram_quantile"}


def series(family: Family) -> set[str]:
    """Names under which Prometheus has a figure."""
    if family.kind != "histogram":
        return {family.name}
    return {f"{family.name}_{end}" for end in ("bucket", "sum", "count")}


def known() -> dict[str, set[str]]:
    """Labels of every series."""
    ours = {
        name: {*family.labels, *({"le"} if name.endswith("_bucket") else ())}
        for family in FAMILIES.values()
        for name in series(family)
    }
    return {**ours, **OTHERS}


def problems(query: str) -> set[str]:
    """What a query names that is not there."""
    labels: set[str] = set()
    for inside in re.findall(r"\{([^}]*)\}", query):
        labels |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))
    labels |= {one.strip() for inside in re.findall(r"\bby \(([^)]*)\)", query) for one in inside.split(",")}
    bare = re.sub(r"\bby \([^)]*\)|\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", "", query)
    names = set(re.findall(r"[a-z_][a-z0-9_]*", bare)) - _WORDS
    missing = names - set(known())
    allowed = TARGET.union(*(known()[name] for name in names - missing))
    return missing | (labels - allowed)


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((HERE / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboards() -> Iterator[tuple[str, str]]:
    """(dashboard, query)."""
    for path in sorted((HERE / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield path.stem, target["expr"]


def test_queries_name_what_there_is() -> None:
    queries = [*dashboards(), *((rule["alert"], rule["expr"]) for rule in alerts())]
    scaled = [one for one in of_kind(rendered("ha"), "ScaledObject") if "query" in str(one["spec"]["triggers"])]
    queries += [("keda", one["spec"]["triggers"][0]["metadata"]["query"]) for one in scaled]
    assert len(queries) > 70 and scaled
    assert not {(where, query): problems(query) for where, query in queries if problems(query)}


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("sum(codegraft_jobz)", {"codegraft_jobz"}),
        ('codegraft_jobs{stade="QUEUED"}', {"stade"}),
        ("max by (project) (codegraft_jobs)", {"project"}),
        ("rate(codegraft_store_request_seconds[5m])", {"codegraft_store_request_seconds"}),
    ],
)
def test_a_query_that_names_something_else_is_found(query: str, wrong: set[str]) -> None:
    assert problems(query) == wrong


def test_every_figure_is_on_a_dashboard() -> None:
    text = " ".join(query for _, query in dashboards())
    unseen = {name for name, family in FAMILIES.items() if not any(one in text for one in series(family))}
    assert unseen == {"codegraft_service_info", "process_start_time_seconds"}


def test_dashboards_are_as_they_are_described() -> None:
    """To mend: python3 deploy/telemetry/dashboards.py"""
    made = runpy.run_path(str(HERE / "dashboards.py"))["texts"]()
    assert {path.name: path.read_text() for path in (HERE / "dashboards").iterdir()} == made
    for text in made.values():
        places = [tuple(panel["gridPos"].values()) for panel in json.loads(text)["panels"]]
        assert len(places) == len(set(places))


# --- alerts ---------------------------------------------------------------------------------------------------------


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Prometheus' own tool, which `make` brings."""
    found = shutil.which("promtool", path=f"{sysconfig.get_path('scripts')}:/usr/bin:/usr/local/bin")
    assert found, "run `make promtool`"
    return subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_rules_fire_when_they_should() -> None:
    checked = promtool("check", "rules", HERE / "alerts.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", HERE / "alerts_test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert promtool("check", "config", HERE / "prometheus.yaml").returncode == 0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("> 3600", "> 36000"), ("for: 5m", "for: 50m"), ('"FAILED"', '"READY"'), ("< 0.2", "< 0.02")],
)
def test_rules_that_are_wrong_are_found(right: str, wrong: str, tmp_path: Path) -> None:
    text = (HERE / "alerts.yaml").read_text()
    assert right in text
    (tmp_path / "alerts.yaml").write_text(text.replace(right, wrong))
    shutil.copy(HERE / "alerts_test.yaml", tmp_path)
    assert promtool("test", "rules", tmp_path / "alerts_test.yaml").returncode != 0


def test_every_alert_is_tested() -> None:
    tests = [
        one
        for test in yaml.safe_load((HERE / "alerts_test.yaml").read_text())["tests"]
        for one in test["alert_rule_test"]
    ]
    fires = {one["alertname"] for one in tests if one.get("exp_alerts")}
    assert fires == {rule["alert"] for rule in alerts()}


def test_every_runbook_has_an_alert_and_every_alert_a_runbook() -> None:
    named = {rule["annotations"]["runbook"].removeprefix("docs/runbooks/") for rule in alerts()}
    assert named == RUNBOOKS
    for rule in alerts():
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in {"critical", "warning", "info"}


def test_a_runbook_names_the_alerts_that_lead_to_it() -> None:
    """Whoever was woken by an alert finds its name on the page, and nobody looks for one that is no more."""
    leading: dict[str, set[str]] = {page: set() for page in RUNBOOKS}
    for rule in alerts():
        leading[rule["annotations"]["runbook"].rpartition("/")[2]].add(rule["alert"])
    pages = {page: (ROOT / "docs/runbooks" / page).read_text() for page in RUNBOOKS}
    named = {page: set(re.findall(r"`(Codegraft[A-Z]\w+)`", text)) for page, text in pages.items()}
    assert named == leading


def test_the_chart_has_the_same_rules() -> None:
    """To mend: cp deploy/telemetry/alerts.yaml deploy/helm/codegraft/files/alerts.yaml"""
    assert (CHART / "files/alerts.yaml").read_text() == (HERE / "alerts.yaml").read_text()
    [made] = of_kind(rendered("ha"), "PrometheusRule")
    assert made["spec"] == yaml.safe_load((HERE / "alerts.yaml").read_text())
    assert made["metadata"]["labels"]["release"] == "prometheus"
    linked = render({**example("ha"), "metrics": {"rules": True, "runbooks": "https://docs.example.com/"}})
    [made] = of_kind(linked, "PrometheusRule")
    rule = made["spec"]["groups"][0]["rules"][0]
    assert rule["annotations"]["runbook"] == "https://docs.example.com/service-not-ready.md"


# --- the chart ------------------------------------------------------------------------------------------------------


def test_every_pod_of_ours_is_scraped() -> None:
    objects = rendered("ha")
    [monitor] = of_kind(objects, "PodMonitor")
    assert set(monitor["spec"]) == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "15s"}
    assert {
        label.replace(".", "_").replace("/", "_").replace("-", "_") for label in monitor["spec"]["podTargetLabels"]
    } <= TARGET
    selector = monitor["spec"]["selector"]["matchLabels"]
    for component, workload in workloads(objects).items():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        annotations = workload["spec"]["template"]["metadata"]["annotations"]
        ours = component not in ("nats", "minio")
        assert selector.items() <= labels.items()
        ports = [port["containerPort"] for port in container(workload)["ports"] if port["name"] == "metrics"]
        assert ports == ([9464] if ours else [])
        assert "prometheus.io/scrape" not in annotations, "twice"
    for component, workload in workloads(rendered("trial")).items():
        annotations = workload["spec"]["template"]["metadata"].get("annotations", {})
        found = annotations.get("prometheus.io/port") if component not in ("nats", "minio") else "9464"
        assert found == "9464"


def test_figures_can_be_left_out() -> None:
    objects = tuple(render({**example("trial"), "metrics": {"enabled": False}}))
    assert "9464" not in str([workloads(objects), of_kind(objects, "ConfigMap", "NetworkPolicy", "PodMonitor")])


def test_only_monitoring_reads_figures() -> None:
    objects = rendered("ha")
    for component, labels in pods(objects).items():
        ours = component not in ("client", "stranger", "nats", "minio")
        if ours:
            assert allows(objects, "Ingress", labels, {}, 9464, MONITORING), component
            assert allows(objects, "Ingress", labels, {}, 9464, KEDA), component
            assert not allows(objects, "Ingress", labels, pods(objects)["stranger"], 9464), component
            assert not allows(objects, "Ingress", labels, {}, 9464, {"kubernetes.io/metadata.name": NAMESPACE})


def test_spans_may_leave_for_the_collector_and_no_further() -> None:
    objects = rendered("external")
    for component, labels in pods(objects).items():
        if component not in ("client", "stranger"):
            assert allows(objects, "Egress", labels, {}, 4317, MONITORING), component
            assert not allows(objects, "Egress", labels, {}, 4317, KEDA)
            assert not allows(rendered("ha"), "Egress", pods(rendered("ha"))[component], {}, 4317, MONITORING)


# --- the page -------------------------------------------------------------------------------------------------------


def tables() -> str:
    """Every figure, module by module."""
    parts = []
    for title, module in zip(_TITLES, MODULES, strict=True):
        rows = [f"### {title}", "", "| figure | kind | labels | what it says |", "|---|---|---|---|"]
        for name, family in FAMILIES.items():
            if name in Path(module.__file__ or "").read_text():
                labels = ", ".join(f"`{label}`" for label in family.labels)
                rows.append(f"| `{name}` | {family.kind} | {labels} | {family.help} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


BEGIN, END = "<!-- figures: made by python -m tests.unit.deploy.test_telemetry -->", "<!-- end of figures -->"


def test_the_page_has_every_figure() -> None:
    inside = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert inside == tables()
    assert all(inside.count(f"| `{name}` |") == 1 for name in FAMILIES)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}")
