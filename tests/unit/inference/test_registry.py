"""Pin, flip, drain: counts are exact, running streams keep their version, nothing loses its place that is in use."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.inference.adapters.registry import Pin, Registry
from services.inference.adapters.route import Route, Version

VERSIONS = [Version(sha, f"projects/p/runs/r/checkpoints/{n}", 4, 10) for n, sha in enumerate("abcd")]
A, B, C, D = VERSIONS


def place(registry: Registry, *versions: Version) -> None:
    for version in versions:
        assert registry.reserve()
        registry.put(version, f"weights of {version.sha256}")


def pin(registry: Registry, project: str = "p") -> Pin:
    found = registry.pin(project)
    assert found is not None
    return found


def shas(registry: Registry) -> str:
    return "".join(sorted(holding.version.sha256 for holding in registry.holdings()))


def test_a_running_stream_keeps_its_version_over_a_flip() -> None:
    registry = Registry()
    place(registry, A, B)
    assert registry.flip("p", Route(A)) == Route()
    running = pin(registry)
    assert registry.flip("p", Route(B)) == Route(A)
    assert (running.version, running.weights) == (A, "weights of a") and pin(registry).version is B
    assert registry.streams("p") == {"a": 1, "b": 1}
    running.release()
    running.release()
    assert registry.streams("p") == {"b": 1}


def test_base_model_is_counted_too() -> None:
    registry = Registry()
    streams = pin(registry), registry.pin_base("p")
    assert streams[0].version is None and registry.streams("p") == {"": 2}
    for stream in streams:
        stream.release()
    assert registry.streams("p") == {}


def test_what_no_route_names_goes_first_and_the_longest_unused_of_it() -> None:
    registry = Registry(places=3)
    place(registry, A, B, C)
    registry.flip("p", Route(A))
    used = registry.pin_version("p", B)
    assert used is not None
    used.release()
    place(registry, D)
    assert shas(registry) == "abd", "C was unused for longer than B"
    assert registry.flip("p", Route(B)) == Route(A) and pin(registry).version is B, "rollback is a flip"
    place(registry, C)
    assert shas(registry) == "bcd"


def test_a_routed_version_loses_its_place_last_and_is_asked_for_again() -> None:
    registry = Registry(places=2)
    place(registry, A, B)
    registry.flip("p", Route(A))
    registry.flip("q", Route(B))
    place(registry, C)
    assert shas(registry) == "bc" and registry.route("p") == Route(A)
    assert registry.pin("p") is None and registry.streams("p") == {}
    place(registry, A)
    assert pin(registry).version is A


def test_places_in_use_are_not_taken_and_who_waits_hears_of_the_first_free_one() -> None:
    registry, heard = Registry(places=2), list[bool]()
    registry.listen(lambda: heard.append(registry.reserve()))
    place(registry, A, B)
    registry.keep("b")
    stream = registry.pin_version("p", A)
    assert stream is not None and not registry.reserve()
    assert pin(registry).version is None, "streams do not wait"
    stream.release()
    assert heard == [True] and shas(registry) == "b"
    assert not registry.reserve(), "a reserved place is taken, too"
    registry.cancel()
    assert heard == [True, True]
    registry.put(C, None)
    assert shas(registry) == "bc"


def test_kept_until_dropped_and_drained() -> None:
    registry = Registry(places=2)
    place(registry, A)
    assert registry.keep("x") is None
    holding = registry.keep("a")
    assert holding is not None and holding.streams == 0
    stream = registry.pin_version("p", A)
    assert stream is not None
    registry.flip("p", Route(A))
    assert not registry.drop("a"), "a route names it"
    registry.flip("p", Route())
    assert registry.drop("a") and shas(registry) == "a", "a stream runs on it still"
    stream.release()
    assert shas(registry) == "" and registry.drop("a")


def test_a_route_keeps_what_was_to_leave() -> None:
    registry = Registry(places=2)
    place(registry, A)
    stream = registry.pin_version("p", A)
    assert stream is not None and registry.drop("a"), "once its stream has ended"
    registry.flip("p", Route(A))
    stream.release()
    assert shas(registry) == "a" and registry.pin("p") is not None


def test_the_same_weights_are_here_once_by_every_name_that_was_asked_for() -> None:
    registry = Registry(places=2)
    place(registry, A)
    other, third = (f"projects/q/runs/{run}/checkpoints/0" for run in ("other", "third"))
    assert registry.ask(other) is None is registry.ask(other, "a"), "nobody told yet that these are its weights"
    assert registry.call(other, "b") is None
    assert registry.call(other, "a") == replace(A, checkpoint=other) == registry.ask(other) == registry.ask(other, "a")
    registry.flip("q", Route(replace(A, checkpoint=third)))
    (holding,) = registry.holdings()
    assert holding.version == A and holding.names == (A.checkpoint, other, third)
    registry.flip("q", Route())
    assert registry.drop("a") and registry.ask(other) is None, "names go with the weights"
    place(registry, replace(A, checkpoint=other))
    assert registry.holdings()[0].names == (other,)


class Swaps(RuleBasedStateMachine):
    """Any order of pins, releases, flips, loads, keeps and drops, over fewer places than versions."""

    def __init__(self) -> None:
        super().__init__()
        self.registry, self.pins = Registry(places=2), list[Pin]()
        self.routes = {"p": Route(), "q": Route()}
        self.kept = set[str]()

    projects, versions = st.sampled_from("pq"), st.sampled_from(VERSIONS)

    def used(self) -> set[str]:
        return {pin.version.sha256 for pin in self.pins if pin.version} | self.kept

    @rule(project=projects, key=st.text(max_size=2))
    def pin(self, project: str, key: str) -> None:
        wanted = self.routes[project].choose(project, key)
        found = self.registry.pin(project, key)
        assert (found is None) == (wanted is not None and wanted.sha256 not in shas(self.registry))
        if found is not None:
            assert found.version == wanted
            self.pins.append(found)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))).release()

    @rule(project=projects, main=st.none() | versions, second=st.none() | versions, percent=st.sampled_from([0, 40]))
    def flip(self, project: str, main: Version | None, second: Version | None, percent: int) -> None:
        before, self.routes[project] = self.routes[project], Route(main, second, percent)
        assert self.registry.flip(project, self.routes[project]) == before

    @rule(version=versions)
    def load(self, version: Version) -> None:
        if self.registry.find(version.sha256) is None:
            full = len(self.used()) == 2
            assert self.registry.reserve() is not full
            if not full:
                self.registry.put(version, None)

    @rule(version=versions)
    def keep(self, version: Version) -> None:
        if self.registry.keep(version.sha256):
            self.kept.add(version.sha256)

    @rule(version=versions)
    def drop(self, version: Version) -> None:
        routed = any(version.sha256 in route.versions() for route in self.routes.values())
        assert self.registry.drop(version.sha256) is not routed
        if not routed:
            self.kept.discard(version.sha256)

    @invariant()
    def counts_are_exact(self) -> None:
        held = {holding.version.sha256: holding for holding in self.registry.holdings()}
        assert len(held) <= 2 and self.used() <= held.keys()
        for sha256, holding in held.items():
            assert holding.streams == sum(pin.version is not None and pin.version.sha256 == sha256 for pin in self.pins)
            assert holding.projects == tuple(p for p in "pq" if sha256 in self.routes[p].versions())
        for project in "pq":
            assert sum(self.registry.streams(project).values()) == sum(p.project == project for p in self.pins)


TestSwaps = Swaps.TestCase
TestSwaps.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_all_counts_are_zero_after_100_000_operations_of_many_threads() -> None:
    registry, wrong = Registry(places=3), list[str]()

    def work(seed: int) -> None:
        rng, pins = random.Random(seed), list[Pin]()
        for _ in range(25_000):
            project, version = rng.choice("pq"), rng.choice(VERSIONS)
            match rng.randrange(10):
                case 0:
                    registry.flip(project, Route(version, rng.choice([None, A, B]), rng.choice([0, 50])))
                case 1:
                    registry.flip(project, Route())
                case 2 | 3:
                    if registry.find(version.sha256) is None and registry.reserve():
                        registry.put(version, version.sha256)
                case 4:
                    registry.keep(version.sha256)
                    registry.drop(version.sha256)
                case 5 | 6 | 7 if len(pins) < 2:
                    found = registry.pin(project, str(seed))
                    pins += [found] if found else []
                case _ if pins:
                    pin = pins.pop()
                    if pin.version and (registry.find(pin.version.sha256) is None or pin.weights != pin.version.sha256):
                        wrong.append(pin.version.sha256)
                    pin.release()
        for pin in pins:
            pin.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, "a pinned version lost its place"
    assert registry.streams("p") == registry.streams("q") == {}
    assert all(holding.streams == 0 for holding in registry.holdings())
    for version in VERSIONS:
        registry.drop(version.sha256)
    place(registry, *VERSIONS[:3])
    assert shas(registry) == "abc", "a reservation was lost"
