"""Blocks: who finds whose, who gives way, where they lie; and that no random life of the scheduler mixes them up."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.core import errors
from services.inference.engine.blocks import BLOCK, Blocks, Table, blocks_for
from services.inference.engine.scheduler import Limits, Scheduler, Work
from services.inference.engine.sequence import Reason, Result, Sequence, TokenLogprob
from services.inference.engine.text import TextStream

A, B = b"a", b"b"


def opened(blocks: Blocks, tokens: list[int], root: bytes = A, capacity: int = 0) -> Table:
    """A table whose tokens are all computed."""
    table = blocks.open(root, tokens, reusable=len(tokens) - 1, capacity=capacity)
    assert table is not None
    blocks.commit(table, tokens, len(tokens))
    return table


def pieces(table: Table) -> int:
    """Runs of neighbours that its blocks come in."""
    return 1 + sum(after != before + 1 for before, after in itertools.pairwise(table.blocks))


def test_full_blocks_are_shared_and_others_are_not() -> None:
    blocks, tokens = Blocks(20), list(range(40))
    one, two, shorter = opened(blocks, tokens), opened(blocks, tokens), opened(blocks, tokens[:32])
    assert one.blocks[:2] == two.blocks[:2] and one.blocks[2] != two.blocks[2]
    assert shorter.blocks[0] == one.blocks[0] and shorter.blocks[1] != one.blocks[1], "one token at least is computed"
    assert [blocks.holders(block) for block in one.blocks] == [3, 2, 1]
    for table in (one, two, shorter):
        blocks.close(table)
    assert blocks.held == 0 and blocks.cached == 2


def test_the_same_tokens_are_other_blocks_after_others_and_under_another_root() -> None:
    blocks, tokens = Blocks(20), [*range(16), *range(16), 0]
    table = opened(blocks, tokens)
    assert len(set(table.blocks)) == 3
    other = opened(blocks, tokens, root=B)
    assert not set(other.blocks) & set(table.blocks)
    assert opened(blocks, tokens, root=A).blocks[:2] == table.blocks[:2]


def test_the_longest_unused_goes_first_and_ends_before_begins() -> None:
    blocks = Blocks(6)
    old, new = list(range(100, 133)), list(range(200, 233))
    for tokens in (old, new, old):  # the second use makes it the newer one
        blocks.close(opened(blocks, tokens))
    assert blocks.cached == 4 and blocks.available == 6
    others = [opened(blocks, [7]) for _ in range(3)]
    assert blocks.cached == 3
    blocks.close(others[0])
    tables = [blocks.open(A, tokens[:32], reusable=32, capacity=0) for tokens in (old, new)]
    assert [len(table.names) for table in tables if table] == [2, 1]


def test_too_few_blocks_change_nothing() -> None:
    blocks = Blocks(4)
    table = opened(blocks, list(range(40)))
    blocks.close(opened(blocks, list(range(500, 516))))
    assert blocks.open(A, list(range(33)), reusable=32, capacity=0, spare=1) is None
    assert blocks.open(A, list(range(60)), reusable=59, capacity=0, spare=1) is None
    assert not blocks.grow(table, 5 * BLOCK, 0)
    assert blocks.held == 3 and [blocks.holders(block) for block in table.blocks] == [1, 1, 1] and blocks.cached == 3
    assert blocks.grow(table, 4 * BLOCK, 0) and blocks.cached == 2


def test_sequences_grow_side_by_side_into_neighbouring_blocks() -> None:
    blocks = Blocks(64)
    tables = [opened(blocks, [n] * 40, capacity=120) for n in range(4)]
    for size in range(40, 120):
        assert all(blocks.grow(table, size, 120) for table in tables)
    assert all(pieces(table) == 1 for table in tables)


def test_what_is_dropped_makes_room_for_neighbours() -> None:
    blocks, rng = Blocks(256), random.Random(1)
    runs = []
    for n in range(400):
        size = rng.randrange(20, 300)
        table = opened(blocks, [n] * size, capacity=size + 100)
        for grown in range(size, size + 100):
            assert blocks.grow(table, grown, size + 100)
        blocks.commit(table, [n] * (size + 100), size + 99)
        runs.append(pieces(table))
        blocks.close(table)
    assert sum(runs) / len(runs) < 2.5 and blocks.cached > 200, "nearly in one piece though all memory is in use"


@dataclass(frozen=True)
class Weights:
    digest: str


class Life:
    """A scheduler under random clients, beside a memory that knows what was written to every slot."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.scheduler = Scheduler(Limits(running=5, waiting=8, step_tokens=24, kv_tokens=16 * BLOCK))
        self.memory: dict[int, Any] = {}
        self.live: dict[int, Sequence] = {}
        self.meanings: dict[int, list[int]] = {}
        self.ended: Counter[Reason] = Counter()
        self.submitted = 0

    def submit(self) -> None:
        rng = self.rng
        prompt = [rng.choice((0, 1))] * rng.choice((1, 15, 16, 17, 40, 90)) + [rng.randrange(3)] * rng.randrange(3)
        targets = (0,) * rng.randrange(1, len(prompt) + 1) if rng.random() < 0.1 else ()
        adapter, session = rng.choice((None, Weights("a"), Weights("b"))), rng.choice(("", "", "s"))
        group: list[Sequence] = []
        for _ in range(1 if targets else rng.choice((1, 1, 1, 3))):
            sequence = Sequence(
                prompt=prompt,
                max_tokens=0 if targets else rng.choice((1, 5, 40)),
                text=TextStream([b"x"] * 3),
                deliver=lambda _: None,
                adapter=adapter,
                session=session,
                targets=targets,
                after=group[0] if group else None,
            )
            group.append(sequence)
        try:
            self.scheduler.submit(*group)
        except errors.QueueFull:
            return
        self.submitted += len(group)
        self.live.update({sequence.number: sequence for sequence in group})

    def cancel(self) -> None:
        if self.live:
            self.rng.choice(list(self.live.values())).cancelled = Reason.CANCELLED

    def step(self) -> None:
        """Writes as the runner does, and reads everything that a sequence's tokens would see."""
        plan = self.scheduler.plan(0)
        for sequence, reason in plan.ended:
            self.end(sequence, reason)
        assert sum(len(work.tokens) for work in plan.work) <= 24
        for work in plan.work:
            sequence, table = work.sequence, work.sequence.table
            assert table is not None and work.count > 0
            for at in range(work.start, work.start + len(work.tokens)):
                block = table.blocks[at // BLOCK]
                assert self.scheduler.blocks.holders(block) == 1, "what is written to has one holder"
                guessed = at - work.start - work.count
                meaning = self.meaning(sequence, at) if guessed < 0 else (sequence.number, work.drafts[: guessed + 1])
                self.memory[block * BLOCK + at % BLOCK] = meaning
            # Of each earlier block its first slot, and of the last ones all.
            for at in {*range(0, work.start, BLOCK), *range(max(0, work.start - 2 * BLOCK), work.start)}:
                assert self.memory[table.blocks[at // BLOCK] * BLOCK + at % BLOCK] == self.meaning(sequence, at)
        results = [self.result(work) if work.outputs else None for work in plan.work]
        over = []
        for work, result in zip(plan.work, results, strict=True):
            sequence, before = work.sequence, len(work.sequence.tokens)
            output = sequence.take(result) if result else None
            for at in range(
                before, min(len(sequence.tokens), before + len(work.drafts))
            ):  # a right guess's is the same
                if sequence.tokens[at] != work.drafts[at - before]:
                    break
                assert sequence.table is not None
                self.memory[sequence.table.blocks[at // BLOCK] * BLOCK + at % BLOCK] = self.meaning(sequence, at)
            if output and output.reason:
                assert len(output.logprobs) == len(sequence.targets)
                over.append(sequence)
                self.end(sequence, output.reason)
        self.scheduler.commit(plan.work, results)
        self.scheduler.remove(over, 0)

    def result(self, work: Work) -> Result:
        """As the runner's, with some of the guesses right."""
        if work.sequence.targets:
            return Result((), (TokenLogprob(0, 0.0),) * work.outputs)
        if not work.samples:
            return Result(())
        right = self.rng.randrange(len(work.drafts) + 1)
        return Result((*work.drafts[:right], self.rng.randrange(3)))

    def meaning(self, sequence: Sequence, at: int) -> int:
        """Stands for the sequence's weights and its tokens up to there."""
        known = self.meanings.get(sequence.number)
        if known is None:
            known = self.meanings[sequence.number] = [hash(sequence.root)]
        while len(known) <= at + 1:
            known.append(hash((known[-1], sequence.tokens[len(known) - 1])))
        return known[at + 1]

    def end(self, sequence: Sequence, reason: Reason) -> None:
        del self.live[sequence.number]
        self.meanings.pop(sequence.number, None)
        self.ended[reason] += 1

    def check(self) -> None:
        blocks = self.scheduler.blocks
        holds = Counter(block for s in self.scheduler.running if s.table for block in s.table.blocks)
        assert all(blocks.holders(block) == holds[block] for block in range(blocks.count))
        assert blocks.held == len(holds)
        assert all(s.table is None for s in self.scheduler.waiting)

    def drain(self) -> None:
        for _ in range(4000):
            if not len(self.scheduler):
                break
            self.step()
        self.check()
        assert not len(self.scheduler) and not self.live and self.scheduler.blocks.held == 0
        assert sum(self.ended.values()) == self.submitted


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from(("submit", "cancel", "step", "step")), max_size=60))
def test_no_block_is_in_two_hands(seed: int, operations: list[str]) -> None:
    life = Life(random.Random(seed))
    for operation in operations:
        getattr(life, operation)()
        life.check()
    life.drain()


def test_nothing_is_held_after_100_000_random_operations() -> None:
    life = Life(random.Random(7))
    for operation in life.rng.choices(("submit", "cancel", "step"), weights=(5, 1, 14), k=100_000):
        getattr(life, operation)()
    life.drain()
    scheduler = life.scheduler
    assert min(life.ended[r] for r in (Reason.LENGTH, Reason.CANCELLED, Reason.SUPERSEDED)) > 500
    assert 1000 < scheduler.right_tokens < scheduler.drafted_tokens
    assert scheduler.preemptions > 100 and 0 < scheduler.cached_tokens < scheduler.prompt_tokens
    assert blocks_for(1) == 1 and blocks_for(BLOCK) == 1 and blocks_for(BLOCK + 1) == 2
