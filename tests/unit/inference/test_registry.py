"""Pin, flip, drain: counts are exact, running streams keep their version, nothing is freed that is in use."""

from __future__ import annotations

import random
import threading

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.inference.adapters.registry import Pin, Registry, Version

A, B, C = (Version(sha, f"projects/p/runs/r/checkpoints/{n}", object(), 4, 10) for n, sha in enumerate("abc"))


def shas(registry: Registry) -> set[str]:
    return {holding.version.sha256 for holding in registry.holdings()}


def test_a_running_stream_keeps_its_version_over_a_flip() -> None:
    registry = Registry(idle=0)
    registry.flip("p", A)
    pin = registry.pin("p")
    assert registry.flip("p", B) == "a"
    assert pin.version is A and registry.pin("p").version is B
    assert shas(registry) == {"a", "b"} and registry.streams("p") == {"a": 1, "b": 1}
    pin.release()
    pin.release()
    assert shas(registry) == {"b"} and registry.streams("p") == {"b": 1}


def test_base_model_is_counted_too() -> None:
    registry = Registry()
    pin, forced = registry.pin("p"), registry.pin_base("p")
    assert pin.version is None and registry.streams("p") == {"": 2}
    pin.release()
    forced.release()
    assert registry.streams("p") == {}


def test_the_longest_idle_is_freed_and_rollback_is_a_flip() -> None:
    registry = Registry(idle=1)
    for version in (A, B, C):
        registry.flip("p", version)
    assert shas(registry) == {"b", "c"}
    found = registry.find("b")
    assert found is B
    registry.flip("p", found)
    assert registry.active("p") is B and shas(registry) == {"b", "c"}


def test_a_version_that_another_project_serves_stays() -> None:
    registry = Registry(idle=0)
    registry.flip("p", A)
    registry.flip("q", A)
    registry.flip("p", None)
    assert registry.active("q") is A and registry.drop("a") is False
    registry.flip("q", None)
    assert shas(registry) == set()


def test_kept_until_dropped_and_drained() -> None:
    registry = Registry(idle=0)
    assert registry.keep(A).streams == 0
    pin = registry.pin_version("p", A)
    assert registry.drop("a") and shas(registry) == {"a"}, "a stream runs on it still"
    pin.release()
    assert shas(registry) == set() and registry.drop("a")


class Swaps(RuleBasedStateMachine):
    """Any order of pins, releases, flips, keeps and drops."""

    def __init__(self) -> None:
        super().__init__()
        self.registry, self.pins = Registry(idle=1), list[Pin]()
        self.alias: dict[str, Version | None] = {}

    projects, versions = st.sampled_from(["p", "q"]), st.sampled_from([A, B, C])

    @rule(project=projects)
    def pin(self, project: str) -> None:
        self.pins.append(self.registry.pin(project))
        assert self.pins[-1].version is self.alias.get(project)

    @rule(project=projects, version=versions)
    def pin_version(self, project: str, version: Version) -> None:
        self.pins.append(self.registry.pin_version(project, version))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))).release()

    @rule(project=projects, version=st.none() | versions)
    def flip(self, project: str, version: Version | None) -> None:
        self.registry.flip(project, version)
        self.alias[project] = version

    @rule(version=versions)
    def keep_and_drop(self, version: Version) -> None:
        if version in self.alias.values():
            assert not self.registry.drop(version.sha256)
        else:
            self.registry.keep(version)
            assert self.registry.drop(version.sha256)

    @invariant()
    def counts_are_exact(self) -> None:
        held = {holding.version: holding for holding in self.registry.holdings()}
        used = {pin.version for pin in self.pins if pin.version} | {v for v in self.alias.values() if v}
        assert used <= held.keys()
        assert len(held.keys() - used) <= 1, "at most one idle"
        for version, holding in held.items():
            assert holding.streams == sum(pin.version is version for pin in self.pins)
        for project in ("p", "q"):
            assert sum(self.registry.streams(project).values()) == sum(p.project == project for p in self.pins)


TestSwaps = Swaps.TestCase
TestSwaps.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_all_counts_are_zero_after_100_000_operations_of_many_threads() -> None:
    registry, stop = Registry(idle=1), threading.Event()
    wrong: list[str] = []

    def stream(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25_000):
            pin = registry.pin(rng.choice("pq"))
            if pin.version is not None and registry.find(pin.version.sha256) is None:
                wrong.append(pin.version.sha256)
            pin.release()

    def swap() -> None:
        rng = random.Random(0)
        while not stop.is_set():
            registry.flip(rng.choice("pq"), rng.choice([None, A, B, C]))

    threads = [threading.Thread(target=stream, args=(n,)) for n in range(4)]
    swapper = threading.Thread(target=swap)
    for thread in (*threads, swapper):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    swapper.join()
    assert not wrong, "a pinned version was freed"
    assert registry.streams("p") == registry.streams("q") == {}
    assert all(holding.streams == 0 for holding in registry.holdings())
