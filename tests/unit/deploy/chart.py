"""The chart as Helm renders it, without a cluster, for every values file that it ships as an example."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[3]
CHART = ROOT / "deploy/helm/codegraft"
EXAMPLES = ("trial", "gpu", "external", "ha")
NAMESPACE = "ml"
Object = dict[str, Any]


def example(name: str) -> Object:
    """The values of ci/<name>-values.yaml."""
    values: Object = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
    return values


def render(values: Object, release: str = "demo") -> list[Object]:
    """All objects.

    Raises:
        helm_python.HelmError: the values do not fit the schema, or a template refuses them.
    """
    with helm_python.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=release, namespace=NAMESPACE)
    texts = [text for name, text in sorted(files.items()) if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


@cache
def rendered(name: str) -> tuple[Object, ...]:
    """The objects of an example; do not change them."""
    return tuple(render(example(name)))


def of_kind(objects: tuple[Object, ...] | list[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def workloads(objects: tuple[Object, ...] | list[Object]) -> dict[str, Object]:
    """Deployments and StatefulSets by component."""
    return {
        found["metadata"]["labels"]["app.kubernetes.io/component"]: found
        for found in of_kind(objects, "Deployment", "StatefulSet")
    }


def pod(workload: Object) -> Object:
    """Its pods' spec."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Object) -> Object:
    """The one container of its pods."""
    (only,) = pod(workload)["containers"]
    found: Object = only
    return found
