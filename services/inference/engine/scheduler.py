"""Which tokens the next step computes. Knows no torch.

Continuous batching with chunked prefill (Sarathi-Serve, arXiv:2403.02310): every running sequence decodes one token a
step, and what is left of the step's token budget goes to prompts in the order of their admission. So a long prompt
never stops the others, and a finished one makes room within a step.

Without prompts it goes to guesses of what the decoding ones will say next (engine/speculate.py): the first thing to go
when the budget or the memory is short, so that they delay nobody.

Memory is given out block by block as sequences grow, not for the longest they might get: most end early. When it runs
out, the sequence admitted last gives up its blocks and goes back to the head of the queue, to be computed again (what
of it is still cached is not). Waiting instead could deadlock, each for a block of the other. This cannot: the one
admitted first is never the victim of others, no sequence may be larger than the whole memory, and nobody overtakes
those that gave up their blocks, so it ends, and then the next is first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from services.core.errors import InvalidArgument
from services.inference.engine.admission import Admission
from services.inference.engine.blocks import BLOCK, Blocks, blocks_for
from services.inference.engine.sequence import Reason, Result, Sequence
from services.inference.engine.speculate import most_guesses, price, share
from services.inference.engine.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes on."""

    running: int = 16
    """Most sequences in one step."""
    waiting: int = 64
    """Most sequences in the queue; more are refused."""
    project_running: int = 256
    """Most sequences of one project in one step."""
    project_waiting: int = 64
    """Most sequences of one project in the queue."""
    step_tokens: int = 256
    """Most tokens in one step: bounds how long a prompt delays everybody's next token."""
    kv_tokens: int = 32768
    """Most tokens whose keys and values are kept at once, those of ended sequences too."""
    draft_tokens: int = 7
    """Most guessed tokens of a sequence in one step; 0 for none."""
    retry_seconds: float = 1.0
    """What a refused caller is told to wait while nothing has been measured yet."""

    @property
    def blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.kv_tokens // BLOCK


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens [start, start + count) of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...] = ()
    """Guesses of what comes behind them, computed with them."""
    repeats: bool = False
    """Whether the guesses spell an overhang; the others are the drafter's."""

    @property
    def tokens(self) -> list[int]:
        """All that is computed."""
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.drafts]

    @property
    def samples(self) -> bool:
        """Whether the step gives the sequence's next token: no prompt token is left after it."""
        return not self.sequence.targets and self.start + self.count == len(self.sequence.tokens)

    @property
    def outputs(self) -> int:
        """How many of its last tokens need the model's output: those to sample after, or those before targets."""
        return max(0, self.start + self.count - max(self.start, self.sequence.reusable)) + len(self.drafts)


@dataclass(slots=True)
class Plan:
    """One step."""

    work: list[Work] = field(default_factory=list)
    """At most one entry a sequence."""
    admitted: list[Sequence] = field(default_factory=list)
    """Sequences whose first step this is; not those that were there before and had to give up their blocks."""
    ended: list[tuple[Sequence, Reason]] = field(default_factory=list)
    """Sequences that are out from now on, and why."""


class Scheduler:
    """The queue and the running set. Not thread-safe: the engine holds its lock around every call."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.blocks = Blocks(limits.blocks)
        self._admission = Admission(limits)
        self.calm = 0
        """While it is not 0 there are no guesses: steps are short."""
        self.prompt_tokens = 0
        """Of all sequences admitted so far."""
        self.cached_tokens = 0
        """Of these, those that were not computed again."""
        self.drafted_tokens = 0
        """Tokens that were guessed."""
        self.right_tokens = 0
        """Of these, those that the model would have chosen itself."""
        self.generated_tokens = 0
        """New tokens of all sequences, right guesses too."""
        self.preemptions = 0
        """Times that a sequence had to give up its blocks."""

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, sequence: Sequence, *others: Sequence) -> None:
        """Queues a sequence, in place of an older one of its session; others of the same request with it.

        Raises:
            QueueFull: too many wait already, of all or of its project, or for too long to meet its deadline.
            InvalidArgument: it could never run within the limits.
        """
        if blocks_for(sequence.capacity) > self.blocks.count:
            raise InvalidArgument(
                f"prompt and completion of {sequence.capacity} tokens exceed this replica's {self.limits.kv_tokens}",
                field="stop.max_tokens",
                hint="Ask for fewer tokens or give a shorter prompt.",
            )
        left = None if sequence.deadline is None else sequence.deadline - sequence.submit_time
        older = self.admit(sequence.project, sequence.session, 1 + len(others), left)
        for one in older:
            one.cancelled = one.cancelled or Reason.SUPERSEDED
        for one in (sequence, *others):
            self.waiting.add(one)

    def admit(self, project: str, session: str, count: int, left: float | None) -> list[Sequence]:
        """Lets the new sequences of a request through, all or none; what they replace of their session.

        Args:
            count: of the new sequences.
            left: seconds until their deadline; None when they have none.

        Raises:
            QueueFull: too many wait already, of all or of its project, or for too long to meet its deadline.
        """
        everybody = (*self.waiting, *self.running)
        older = [one for one in everybody if session and one.session == session]
        staying = {one.number for one in everybody if not one.cancelled} - {one.number for one in older}
        queued, running = (
            [one.project for one in part if one.number in staying] for part in (self.waiting, self.running)
        )
        self._admission.check(project, count, left, queued, running)
        return older

    def plan(self, now: float) -> Plan:
        """The next step; sequences whose time is over leave first."""
        plan = Plan()
        for sequence in (*self.waiting, *self.running):
            if sequence.cancelled is None and sequence.deadline is not None and now >= sequence.deadline:
                sequence.cancelled = Reason.DEADLINE
            if sequence.cancelled is not None:
                plan.ended.append((sequence, sequence.cancelled))
        self.remove((sequence for sequence, _ in plan.ended), now)
        self._grow()
        self._admit(plan, now)
        budget = self.limits.step_tokens
        decoding = [sequence for sequence in self.running if sequence.remaining == 1]
        prefilling = [sequence for sequence in self.running if sequence.remaining > 1]
        for sequence in (*decoding, *prefilling):
            count = min(sequence.remaining, budget)
            if count == 0:
                break
            item = self._repeat(Work(sequence, sequence.computed, count), budget - count)
            plan.work.append(item)
            budget -= count + len(item.drafts)
        if not prefilling and not self.calm:  # whoever waits for the first token waits for the whole step
            self._draft(plan.work, budget)
        return plan

    def commit(self, work: list[Work], results: list[Result | None]) -> None:
        """Takes note that a step's work is done and its tokens taken: their keys and values are there, but for the
        last; those of wrong guesses lie behind them, where the next step writes."""
        for item, result in zip(work, results, strict=True):
            sequence = item.sequence
            right = max(0, len(result.tokens) - 1) if result else 0
            if not item.repeats:
                sequence.drafter.learn(len(item.drafts), right)
                self.drafted_tokens += len(item.drafts)
                self.right_tokens += right
            self.generated_tokens += len(result.tokens) if result else 0
            sequence.computed = min(item.start + item.count + right, len(sequence.tokens))
            if sequence.table is not None:
                self.blocks.commit(sequence.table, sequence.tokens, sequence.computed)

    def remove(self, sequences: Iterable[Sequence], now: float) -> None:
        """Takes sequences out; their place and their blocks are free for the next step."""
        gone = {sequence.number for sequence in sequences}
        if gone:
            for sequence in self.running:
                if sequence.number in gone:
                    self._free(sequence)
                    self._admission.left(sequence, now)
            self.waiting.remove(gone)
            self.running = [s for s in self.running if s.number not in gone]

    def _repeat(self, item: Work, budget: int) -> Work:
        """With what spells the overhang behind it, where its prompt is through and there is room: it is a few tokens,
        and one by one each would take a step before the caller sees anything."""
        sequence, drafts = item.sequence, item.sequence.text.overhang.ids if item.samples else ()
        if not drafts or len(drafts) > budget:
            return item
        assert sequence.table is not None
        if self.blocks.available <= len(self.running) or not self.blocks.grow(
            sequence.table, len(sequence.tokens) + len(drafts), sequence.capacity
        ):
            return item
        return replace(item, drafts=drafts, repeats=True)

    def _draft(self, work: list[Work], budget: int) -> None:
        """Adds guesses to the decodes of a step, as far as the budget goes and they are worth their arithmetic."""
        cost = price(sum(item.count for item in work))
        guesses = dict[int, tuple[int, ...]]()
        for at, item in enumerate(work):
            if item.count > 1 or not item.samples or item.drafts:
                continue  # its prompt is not through, or has just come to its end
            sequence = item.sequence
            size = min(self.limits.draft_tokens, sequence.draftable)
            guesses[at] = sequence.drafter.draft(sequence.tokens, size, cost)
        sizes = {at: len(guess) for at, guess in guesses.items()}
        likely = {at: work[at].sequence.drafter.trust for at in guesses}
        for at, size in share(likely, sizes, min(budget, most_guesses(len(work)))).items():
            sequence = work[at].sequence
            assert sequence.table is not None
            if self.blocks.available <= len(self.running):  # others may have to grow into these
                size = min(size, len(sequence.table.blocks) * BLOCK - len(sequence.tokens))
            if size and self.blocks.grow(sequence.table, len(sequence.tokens) + size, sequence.capacity):
                work[at] = replace(work[at], drafts=guesses[at][:size])

    def _grow(self) -> None:
        """Sees that every running sequence has blocks for its tokens, at the cost of those admitted last."""
        served = 0
        while served < len(self.running):
            sequence = self.running[served]
            assert sequence.table is not None
            if self.blocks.grow(sequence.table, len(sequence.tokens), sequence.capacity):
                served += 1
                continue
            victim = self.running.pop()
            self._free(victim)
            if victim.targets:
                victim.logprobs.clear()  # they come again
            self.waiting.give_back(victim)
            self.preemptions += 1

    def _admit(self, plan: Plan, now: float) -> None:
        held = Counter(sequence.project for sequence in self.running)
        while len(self.running) < self.limits.running:
            sequence = self.waiting.next(held, self.limits.project_running)
            if sequence is None:
                break
            sequence.table = self.blocks.open(
                sequence.root,
                sequence.tokens,
                reusable=sequence.reusable,
                capacity=sequence.capacity,
                spare=len(self.running),  # a block each to grow into, or somebody had to give up theirs soon
            )
            if sequence.table is None:
                break  # whose turn it is: small ones that went before a large one would starve it
            self.waiting.take(sequence)
            self.running.append(sequence)
            held[sequence.project] += 1
            sequence.computed = len(sequence.table.names) * BLOCK
            if sequence.cached is None:
                sequence.start_time = now
                sequence.cached = min(sequence.computed, len(sequence.prompt))
                self.prompt_tokens += len(sequence.prompt)
                self.cached_tokens += sequence.cached
                plan.admitted.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.blocks.close(sequence.table)
        sequence.table, sequence.computed = None, 0
