"""One worker gets the tests that compute, the longest first; the others those that wait, and then they help."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.order import COMPUTING, TOGETHER, OneComputes

ROOT = Path(__file__).parents[2]
SHORT = [f"tests/unit/test_{file}.py::test_{number}" for file in "ab" for number in range(5)]
PATH, CONSOLE = "tests/e2e/test_whole_path.py::test_a", "tests/e2e/test_whole_console.py::test_a"
STACK, FAULTS = "tests/e2e/test_stack.py::test_up", "tests/chaos/test_faults.py::test_a"


class Worker:
    """A worker of pytest-xdist, that does one test when it is told to."""

    shutting_down = False
    gateway = SimpleNamespace(id="it")

    def __init__(self) -> None:
        self.given: list[int] = []
        self.done = 0

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def order(tests: list[str], count: int) -> list[list[str]]:
    """In which so many workers do them, all equally fast."""
    config: Any = SimpleNamespace(getvalue=lambda _: ["popen"] * count, option=SimpleNamespace(loadscopereorder=True))
    workers: list[Any] = [Worker() for _ in range(count)]
    scheduler = OneComputes(config)
    for worker in workers:
        scheduler.add_node(worker)
    for worker in workers:
        scheduler.add_node_collection(worker, tests)
    scheduler.schedule()
    while scheduler.has_pending:
        for worker in workers:
            if worker.done < len(worker.given):
                worker.done += 1
                scheduler.mark_test_complete(worker, worker.given[worker.done - 1])
    return [[tests[index] for index in worker.given] for worker in workers]


def test_files_that_are_named_are_there() -> None:
    files = {*TOGETHER, *COMPUTING} - set(TOGETHER.values())
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_one_worker_has_the_longest_first_and_those_of_a_stack_together() -> None:
    assert order([FAULTS, STACK, CONSOLE, PATH, *SHORT], 1) == [[CONSOLE, PATH, STACK, FAULTS, *SHORT]]


def test_another_one_begins_with_the_others_and_then_helps() -> None:
    long = [f"tests/e2e/test_whole_path.py::test_{number}" for number in range(20)]
    first, second = order([FAULTS, STACK, *long, *SHORT], 2)
    assert first[:20] == long and second[:10] == SHORT
    assert sorted(first[20:] + second[10:]) == sorted([FAULTS, STACK]) and STACK in second
