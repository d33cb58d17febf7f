"""Who may talk to whom: the policies read as a network would, for all pairs of pods and ports."""

from __future__ import annotations

import ipaddress

from tests.unit.deploy.chart import NAMESPACE, Object, example, of_kind, render, rendered, workloads

SERVICES = {"ingest": 50051, "scanner": 50052, "trainer": 50053, "inference": 50054}
STATEFUL = {"ingest", "scanner", "scanner-worker", "trainer", "trainer-worker", "inference"}
CLIENT = {"codegraft.dev/client": "true"}
STRANGER = {"app.kubernetes.io/name": "other"}
KEDA = {"kubernetes.io/metadata.name": "keda"}


def pods(objects: tuple[Object, ...]) -> dict[str, dict[str, str]]:
    """Labels of the pods by component, and of two that are not ours."""
    found = {name: one["spec"]["template"]["metadata"]["labels"] for name, one in workloads(objects).items()}
    return {**found, "client": CLIENT, "stranger": STRANGER}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    equal = selector.get("matchLabels", {}).items() <= labels.items()
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        equal = equal and labels.get(expression["key"]) in expression["values"]
    return bool(equal)


def is_peer(peer: Object, labels: dict[str, str], namespace: dict[str, str] | None) -> bool:
    """Whether a rule means these pods; namespace None is the release's own."""
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        here = namespace if namespace is not None else {"kubernetes.io/metadata.name": NAMESPACE}
        return selects(peer["namespaceSelector"], here) and selects(peer.get("podSelector", {}), labels)
    return namespace is None and selects(peer["podSelector"], labels)


def allows(
    objects: tuple[Object, ...],
    direction: str,
    of: dict[str, str],
    peer: dict[str, str],
    port: int,
    namespace: dict[str, str] | None = None,
) -> bool:
    """Whether the policies of the pods ``of`` let traffic in from, or out to, the peer's port."""
    applying = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], of)
    ]
    end = "from" if direction == "Ingress" else "to"
    return not applying or any(
        any(is_peer(one, peer, namespace) for one in rule[end]) and any(one["port"] == port for one in rule["ports"])
        for policy in applying
        for rule in policy.get(direction.lower(), [])
    )


def ways(objects: tuple[Object, ...]) -> set[tuple[str, str, int]]:
    """All (from, to, port) that both ends' policies allow, within the namespace."""
    everyone = pods(objects)
    ports = {*SERVICES.values(), 8080, 4222, 6222, 8222, 9000}
    return {
        (source, target, port)
        for source, mine in everyone.items()
        for target, theirs in everyone.items()
        if target not in ("client", "stranger")
        for port in ports
        if allows(objects, "Egress", mine, theirs, port) and allows(objects, "Ingress", theirs, mine, port)
    }


def wanted(objects: tuple[Object, ...]) -> set[tuple[str, str, int]]:
    here = set(workloads(objects))
    ways = {("client", service, port) for service, port in SERVICES.items()}
    ways |= {("trainer", "scanner", 50052), ("trainer-worker", "scanner", 50052)}
    ways |= {("inference", "ingest", 50051), ("inference", "trainer", 50053)}
    if "gateway" in here:
        ways |= {("gateway", service, port) for service, port in SERVICES.items()}
        ways |= {(who, "gateway", 8080) for who in ("client", "stranger")}
    if "nats" in here:
        ways |= {(who, "nats", 4222) for who in STATEFUL} | {("nats", "nats", 6222)}
    if "minio" in here:
        ways |= {(who, "minio", 9000) for who in STATEFUL}
    return ways


def test_the_needed_ways_and_no_others() -> None:
    for name in ("trial", "ha", "external"):
        assert ways(rendered(name)) == wanted(rendered(name)), name


def test_only_monitoring_reads_nats_figures() -> None:
    objects = rendered("ha")
    nats = pods(objects)["nats"]
    assert allows(objects, "Ingress", nats, {}, 8222, KEDA)
    assert not allows(objects, "Ingress", nats, {}, 4222, KEDA)
    assert not allows(objects, "Ingress", nats, {}, 8222, {"kubernetes.io/metadata.name": "default"})


def outside(objects: tuple[Object, ...], component: str, address: str, port: int) -> bool:
    """Whether a component may reach an address that is no pod."""
    labels = pods(objects)[component]
    return any(
        ipaddress.ip_address(address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        and not any(
            ipaddress.ip_address(address) in ipaddress.ip_network(one) for one in peer["ipBlock"].get("except", [])
        )
        and any(one["port"] == port for one in rule["ports"])
        for policy in of_kind(objects, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get("egress", [])
        for peer in rule["to"]
        if "ipBlock" in peer
    )


def test_the_way_out() -> None:
    objects = rendered("external")
    for component in STATEFUL:
        assert outside(objects, component, "10.20.0.7", 4222) and outside(objects, component, "10.30.0.7", 443)
        assert not outside(objects, component, "93.184.216.34", 443), "no Hub is wanted here"
        assert outside(objects, component, "10.40.1.1", 7999) == (component == "ingest")
    assert not outside(objects, "gateway", "10.20.0.7", 4222)
    trial = rendered("trial")
    assert outside(trial, "inference", "93.184.216.34", 443), "base models come from the Hub"
    assert not outside(trial, "inference", "10.1.1.1", 443)
    assert outside(trial, "ingest", "93.184.216.34", 22)
    assert not outside(trial, "ingest", "169.254.169.254", 443), "a cloud's credentials"


def test_everybody_may_ask_for_names() -> None:
    objects = rendered("ha")
    for component, labels in pods(objects).items():
        if component not in ("client", "stranger"):
            assert allows(objects, "Egress", labels, {}, 53, {"kubernetes.io/metadata.name": "kube-system"})


def test_policies_can_be_left_to_others() -> None:
    assert not of_kind(render({**example("trial"), "networkPolicy": {"enabled": False}}), "NetworkPolicy")
