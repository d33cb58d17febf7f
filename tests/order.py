"""Who gets which files of tests, when several workers share them.

pytest-xdist begins with the files of the most tests. Those that start whole stacks and train have few, came last, all
at the same time, and what was left of them at the end had the other worker wait for minutes. Here one worker has them
from the beginning, the longest first; the others begin with what mostly waits for servers, and help it afterwards.
"""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

TOGETHER = {
    "tests/e2e/test_whole_console.py": "tests/e2e: stack",
    "tests/e2e/test_whole_path.py": "tests/e2e: stack",
    "tests/chaos/test_full_disk.py": "tests/chaos: stack",
    "tests/chaos/test_network.py": "tests/chaos: stack",
    "tests/chaos/test_paused_workers.py": "tests/chaos: stack",
    "tests/chaos/test_whole_stack.py": "tests/chaos: stack",
}
"""Files that share a stack, which takes seconds to start: one worker has them all."""

COMPUTING = (
    "tests/e2e: stack",
    "tests/e2e/test_stack.py",
    "tests/chaos: stack",
    "tests/e2e/test_readme.py",
    "tests/e2e/test_scan_replicas.py",
    "tests/contract/test_trainer_kills.py",
    "tests/unit/trainer/test_ranks.py",
    "tests/contract/test_trainer.py",
    "tests/chaos/test_day_two.py",
    "tests/contract/test_trainer_life.py",
    "tests/unit/test_extras.py",
    "tests/chaos/test_faults.py",
    "tests/contract/test_stored_models.py",
    "tests/unit/trainer/test_launch.py",
    "tests/chaos/test_swaps.py",
)
"""What keeps more than one core busy for ten seconds or more, longest first."""


class OneComputes(LoadFileScheduling):  # type: ignore[misc]  # it has no types
    """``--dist loadfile``, in this order."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return TOGETHER.get(file, file)

    def _assign_work_unit(self, node: WorkerController) -> None:
        computing = [each for each in COMPUTING if each in self.workqueue]
        others = [each for each in self.workqueue if each not in COMPUTING]
        first, *_ = computing + others if node is self.nodes[0] else others + computing
        self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)
