"""The engine over a real (tiny) model: the same tokens as transformers, alone, together, and under adapters."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from services.core import errors
from services.inference.engine.engine import Engine
from services.inference.engine.rows import Row, batches
from services.inference.engine.scheduler import Limits, Scheduler, Work
from services.inference.engine.sequence import Reason, Result, Sampling, Sequence
from tests.unit.inference.tiny import Bench, greedy, marker, merged

PROMPTS = [random.Random(n).choices(range(256), k=size) for n, size in enumerate([1, 7, 40, 90, 16, 17])]


def test_tokens_are_those_of_transformers(bench: Bench, reference: LlamaForCausalLM) -> None:
    for prompt in PROMPTS:
        assert bench.submit(prompt, 20).wait().new == greedy(reference, prompt, 20)


def test_those_alike_decode_together() -> None:
    def rows(*blocks: int) -> list[Row]:
        return [Row(n, 1, 16 * count - 1, list(range(count))) for n, count in enumerate(blocks)]

    prompt = Row(4, 9, 0, [0])
    together, alone = batches([*rows(2, 9, 4, 3), prompt], torch.device("cpu"))
    assert not together and len(alone) == 5, "too few are alike"
    together, alone = batches([*rows(2, 9, 4, 3, 2, 1), prompt], torch.device("cpu"))
    assert [batch.tokens.tolist() for batch in together] == []
    together, alone = batches([*rows(2, 9, 4, 3, 2), prompt], torch.device("cpu"))
    assert [batch.tokens.tolist() for batch in together] == [[0, 4, 3, 2]]
    assert {row.begin for row in alone} == {1, 4} and prompt in alone


def test_tokens_do_not_depend_on_the_company(bench: Bench, reference: LlamaForCausalLM) -> None:
    heard = [bench.submit(prompt, 30) for prompt in PROMPTS]
    for prompt, one in zip(PROMPTS, heard, strict=True):
        assert one.wait().new == greedy(reference, prompt, 30)
        assert one.reason is Reason.LENGTH


def test_what_others_left_in_memory_never_counts(bench: Bench, reference: LlamaForCausalLM) -> None:
    for memory in bench.runner._kv:
        memory.fill_(float("nan"))  # as an adapter of huge numbers leaves it
    prompts = [PROMPTS[3][n:50] for n in range(4)]  # alike enough for one operation
    heard = [bench.submit(prompt, 40) for prompt in prompts]
    assert [one.wait().new for one in heard] == [greedy(reference, prompt, 40) for prompt in prompts]


def test_each_sequence_runs_on_its_own_adapter(bench: Bench, reference: LlamaForCausalLM) -> None:
    versions = [None, marker(bench.model, 1), marker(bench.model, 2, rank=8), None, marker(bench.model, 1)]
    heard = [bench.submit(PROMPTS[3], 20, adapter=weights) for weights in versions]
    texts = [one.wait().new for one in heard]
    expected = [greedy(merged(reference, w) if w else reference, PROMPTS[3], 20) for w in versions]
    assert texts == expected
    assert texts[0] == texts[3] and texts[1] == texts[4]
    assert len({tuple(text) for text in texts}) == 3, "the markers must tell the versions apart"


def test_a_b_a_gives_the_tokens_of_a_again(bench: Bench, reference: LlamaForCausalLM) -> None:
    a, b = marker(bench.model, 1), marker(bench.model, 2)
    twin = marker(bench.model, 1)  # the same version, staged once more
    heard = [bench.submit(PROMPTS[3], 20, adapter=weights).wait() for weights in (a, b, a, b, None, twin)]
    assert [one.sequence.cached for one in heard] == [0, 0, 80, 80, 0, 80], "a version finds its own, and only its own"
    expected = [greedy(merged(reference, weights), PROMPTS[3], 20) for weights in (a, b)]
    assert [one.new for one in heard] == [*expected, *expected, greedy(reference, PROMPTS[3], 20), expected[0]]


def test_a_known_beginning_gives_the_same_tokens(bench: Bench, reference: LlamaForCausalLM) -> None:
    for prompt, cached in ((PROMPTS[3], 0), (PROMPTS[3], 80), (PROMPTS[3][:70], 64), ([*PROMPTS[3], 5, 6], 80)):
        heard = bench.submit(prompt, 20).wait()
        assert heard.new == greedy(reference, prompt, 20) and heard.sequence.cached == cached
    conversation = [*PROMPTS[3], *greedy(reference, PROMPTS[3], 20), 7]
    heard = bench.submit(conversation, 20).wait()
    assert heard.sequence.cached == 96, "what was generated is found, too"
    assert heard.new == greedy(reference, conversation, 20)
    assert bench.engine.prefix_tokens == (80 + 64 + 80 + 96, 90 + 90 + 70 + 92 + 111)


def test_those_that_give_up_their_blocks_stream_the_same_text(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(reference, tokenizer, Limits(running=4, step_tokens=16, kv_tokens=9 * 16))
    sampling = Sampling(temperature=1.0, seed=3)
    alone = Bench(reference, tokenizer, Limits())
    alone.engine.start()
    drawn = alone.submit(PROMPTS[2], 60, sampling=sampling).wait()
    alone.engine.stop()
    # All are queued before the first step, so that the course of it is the same every time.
    heard = [bench.submit(PROMPTS[2], 60, sampling=sampling), *(bench.submit(PROMPTS[n], 60) for n in (1, 4, 5))]
    heard.append(bench.submit(PROMPTS[2], 60, sampling=sampling))
    bench.engine.start()
    for one, n in zip(heard[1:4], (1, 4, 5), strict=True):
        assert one.wait().new == greedy(reference, PROMPTS[n], 60)
        assert sum(output.started for output in one.outputs) == 1
    for one in (heard[0], heard[4]):
        assert one.wait().new == drawn.new and one.text == drawn.text, "the draws go on where they were"
    assert bench.engine.preemptions > 0
    bench.engine.stop()
    assert bench.engine.blocks_held == 0


def logprobs_of(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """``[tokens - 1, vocabulary]``: of each next token."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)


def test_log_probabilities_are_the_models(bench: Bench, reference: LlamaForCausalLM) -> None:
    sampling = Sampling(temperature=1.0, top_k=3, seed=1, repetition_penalty=1.5, logprobs=2)
    heard = bench.submit(PROMPTS[2], 20, sampling=sampling).wait()
    told = [item for output in heard.outputs for item in output.logprobs]
    assert [item.token for item in told] == heard.new
    for item, row in zip(told, logprobs_of(reference, heard.sequence.tokens)[len(PROMPTS[2]) - 1 :], strict=True):
        assert item.logprob == pytest.approx(float(row[item.token]), abs=1e-4)
        values, ids = row.topk(2)
        assert [token for token, _ in item.top] == ids.tolist()
        assert [logprob for _, logprob in item.top] == pytest.approx(values.tolist(), abs=1e-4)
    silent = bench.submit(PROMPTS[2], 3).wait()
    assert not any(output.logprobs for output in silent.outputs)
    assert all(
        item.top == () for item in bench.submit([1], 1, sampling=Sampling(logprobs=0)).wait().outputs[-1].logprobs
    )


def test_those_of_one_prompt_share_its_blocks(bench: Bench, reference: LlamaForCausalLM) -> None:
    first = bench.make(PROMPTS[3], 20, session="s")
    others = [bench.make(PROMPTS[3], 20, session="s", after=first.sequence) for _ in range(5)]
    bench.engine.submit(first.sequence, *(one.sequence for one in others))
    assert all(one.wait().new == greedy(reference, PROMPTS[3], 20) for one in (first, *others))
    assert [one.sequence.cached for one in (first, *others)] == [0] + [80] * 5
    first = bench.make(PROMPTS[4], 400)
    second = bench.make(PROMPTS[4], 2, after=first.sequence)
    bench.engine.submit(first.sequence, second.sequence)
    bench.engine.cancel(first.sequence)
    assert second.wait().reason is Reason.LENGTH, "whom it waits for may be gone"


def test_scores_are_the_models_whatever_else_runs(bench: Bench, reference: LlamaForCausalLM) -> None:
    weights = marker(bench.model, 1)
    running = [bench.submit(prompt, 30) for prompt in PROMPTS[:2]]
    for adapter, model in ((None, reference), (None, reference), (weights, merged(reference, weights))):
        tokens = [*PROMPTS[3], *PROMPTS[2]]
        scored = bench.submit(tokens[:-1], 0, targets=tuple(PROMPTS[2]), adapter=adapter).wait()
        rows = logprobs_of(model, tokens)[len(PROMPTS[3]) - 1 :]
        told = scored.outputs[-1].logprobs
        assert [item.token for item in told] == PROMPTS[2] and scored.text == ""
        expected = [float(row[token]) for row, token in zip(rows, PROMPTS[2], strict=True)]
        assert [item.logprob for item in told] == pytest.approx(expected, abs=1e-3)
    one = bench.submit([3], 0, targets=(7,)).wait().outputs[-1].logprobs
    assert [item.logprob for item in one] == pytest.approx([float(logprobs_of(reference, [3, 7])[0, 7])], abs=1e-4)
    for heard, prompt in zip(running, PROMPTS[:2], strict=True):
        assert heard.wait().new == greedy(reference, prompt, 30)


def test_scores_that_had_to_give_up_their_blocks_come_whole(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(reference, tokenizer, Limits(running=2, step_tokens=3, kv_tokens=9 * 16))
    first = bench.submit(PROMPTS[1], 90)  # it grows into the blocks of what comes after it
    scored = bench.submit(PROMPTS[3][:89], 0, targets=tuple(PROMPTS[3][30:]))
    bench.engine.start()
    first.wait()
    told = scored.wait().outputs[-1].logprobs
    rows = logprobs_of(reference, PROMPTS[3])[29:]
    expected = [float(row[token]) for row, token in zip(rows, PROMPTS[3][30:], strict=True)]
    assert [item.logprob for item in told] == pytest.approx(expected, abs=1e-3)
    assert bench.engine.preemptions > 0
    bench.engine.stop()


def test_cancel_frees_the_sequence_within_a_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    step, gate, done = bench.runner.step, threading.Lock(), list[None]()
    begun, unaccounted = list[set[int]](), list[int]()

    def nobodys(scheduler: Scheduler) -> int:
        owned = sum(len(one.table.blocks) for one in scheduler.running if one.table)
        return scheduler.blocks.held - owned

    def watched(work: list[Work]) -> list[Result | None]:
        unaccounted.append(bench.engine.look(nobodys))
        begun.append({item.sequence.number for item in work})
        with gate:
            done.append(None)
            return step(work)

    monkeypatch.setattr(bench.runner, "step", watched)
    stays = bench.submit(PROMPTS[4], 400)
    heard = bench.submit(PROMPTS[1], 400).wait(lambda output: output.tokens > 0)
    with gate:  # a step is in progress
        while len(begun) == len(done):
            time.sleep(0.001)
        assert heard.sequence.number in begun[-1]
        bench.engine.cancel(heard.sequence)
        after = len(begun)
    assert heard.wait().reason is Reason.CANCELLED
    stays.wait(lambda output: len(done) > after + 5)
    assert set[int]().union(*begun[after:]) == {stays.sequence.number}, "another step computed it"
    assert unaccounted[after] == 0, "its blocks are free in the next step"
    bench.engine.cancel(stays.sequence)
    assert stays.wait().reason is Reason.CANCELLED
    assert bench.engine.blocks_held == 0 and bench.engine.load == (0, 0)
    bench.engine.cancel(heard.sequence)  # once more does no harm


def test_deadline_gives_the_text_so_far(bench: Bench) -> None:
    heard = bench.submit(PROMPTS[1], 1900, deadline=time.monotonic() + 20).wait(lambda output: output.tokens > 0)
    heard.sequence.deadline = time.monotonic() + 0.1
    heard.wait()
    assert heard.reason is Reason.DEADLINE
    assert 0 < heard.sequence.generated < 1900 and heard.text


def test_a_newer_request_of_the_session_takes_the_place(bench: Bench) -> None:
    older = bench.submit(PROMPTS[1], 400, session="editor")
    newer = bench.submit(PROMPTS[1], 3, session="editor")
    assert older.wait().reason is Reason.SUPERSEDED
    assert newer.wait().reason is Reason.LENGTH


def test_the_queue_is_bounded(bench: Bench) -> None:
    running = [bench.submit(PROMPTS[0], 400).wait(lambda output: output.started) for _ in range(4)]
    waiting = [bench.submit(PROMPTS[0], 400) for _ in range(6)]
    with pytest.raises(errors.QueueFull) as refused:
        bench.submit(PROMPTS[0], 4)
    assert refused.value.retry_after
    for heard in (*running, *waiting):
        bench.engine.cancel(heard.sequence)
        assert heard.wait().reason is Reason.CANCELLED


def test_same_seed_same_tokens(bench: Bench) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=50, seed=3)
    one, two = (bench.submit(PROMPTS[1], 24, sampling=sampling) for _ in range(2))
    other = bench.submit(PROMPTS[1], 24, sampling=Sampling(temperature=1.0, top_p=0.95, top_k=50, seed=4))
    assert one.wait().new == two.wait().new != other.wait().new


def test_generation_begins_with_the_overhang(bench: Bench) -> None:
    heard = bench.submit(PROMPTS[1], 5, overhang="\n  é").wait()
    assert bytes(b for token in heard.new for b in bench.vocabulary[token]).startswith("\n  é".encode())
    assert heard.sequence.generated == 5 and len(heard.new) == 5 + len("\n  é".encode())
    assert not heard.text.startswith("\n  é")


@pytest.mark.parametrize(("right", "steps"), [(5, 3), (2, 6), (0, 8)])
def test_an_overhang_that_is_spelled_as_guessed_takes_one_step(
    bench: Bench, right: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    overhang = "\n  é".encode()
    ids = tuple(bench.vocabulary.index(bytes([byte])) for byte in overhang)
    guess = ids[:right] + ids[-1:] * (right < len(ids))
    step, works = bench.runner.step, list[list[Work]]()
    monkeypatch.setattr(bench.runner, "step", lambda work: works.append(work) or step(work))
    before = bench.engine.drafted_tokens
    heard = bench.submit(PROMPTS[1], 3, overhang=overhang.decode(), overhang_ids=guess).wait()
    assert tuple(heard.new[:5]) == ids and len(works) == steps
    assert bench.engine.drafted_tokens == before, "it says nothing of what the drafter's guesses are worth"


def test_stop_token_ends_without_text(bench: Bench, reference: LlamaForCausalLM) -> None:
    tokens = greedy(reference, PROMPTS[1], 8)
    at = next(n for n in range(1, 8) if tokens[n] not in tokens[:n])
    heard = bench.submit(PROMPTS[1], 8, stop_ids=frozenset({tokens[at]})).wait()
    assert heard.reason is Reason.END_OF_TEXT and heard.new == tokens[:at]


class Failing:
    """A runner whose every second step fails."""

    def __init__(self) -> None:
        self.steps, self.released = 0, 0

    def begin(self) -> None:
        pass

    def step(self, work: list[Work]) -> list[Result | None]:
        self.steps += 1
        if self.steps == 2:
            raise MemoryError("no room")
        return [Result((65,)) if item.samples else None for item in work]

    def release(self, sequence: Sequence) -> None:
        self.released += 1


def test_a_failing_step_ends_its_sequences_and_the_engine_goes_on(bench: Bench) -> None:
    runner = Failing()
    engine = Engine(runner, Limits())
    first, second = bench.make([1], 5), bench.make([1], 5)
    engine.start()
    engine.submit(first.sequence)
    assert first.wait().reason is Reason.FAILED
    engine.submit(second.sequence)
    assert second.wait().reason is Reason.LENGTH and second.new == [65] * 5
    engine.stop()
    assert runner.released == 2


def test_stop_ends_what_runs_and_refuses_what_comes(bench: Bench) -> None:
    heard = bench.submit(PROMPTS[1], 400).wait(lambda output: output.tokens > 0)
    bench.engine.stop()
    assert heard.wait().reason is Reason.CANCELLED
    with pytest.raises(errors.ShuttingDown):
        bench.submit(PROMPTS[1])


def test_any_company_and_any_order_give_everyone_its_text_and_hold_nothing(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    quiet = Bench(reference, tokenizer, Limits())
    versions = [None, marker(quiet.model, 1), marker(quiet.model, 2, rank=9)]
    kinds = [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3), Sampling(repetition_penalty=1.3, logprobs=1)]
    quiet.engine.start()
    known = {
        (p, v, k): quiet.submit(PROMPTS[p], 32, adapter=versions[v], sampling=kinds[k]).wait().new
        for p in range(len(PROMPTS))
        for v in range(len(versions))
        for k in range(len(kinds))
    }
    quiet.engine.stop()
    # Memory for one long prompt and little else: whoever came last gives up its blocks.
    bench = Bench(reference, tokenizer, Limits(running=4, waiting=8, step_tokens=16, kv_tokens=9 * 16, draft_tokens=3))
    bench.engine.start()
    reasons, wrong = Counter[Reason | None](), list[BaseException]()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            p, v, k = rng.choice(list(known))
            fields = {
                "adapter": versions[v],
                "sampling": kinds[k],
                "deadline": time.monotonic() + rng.choice([0.001, 0.02, 5]),
                "session": rng.choice(["", "", "s"]),
            }
            made = [bench.make(PROMPTS[p], rng.randrange(1, 33), **fields)]
            if rng.random() < 0.2:  # another completion of the same prompt
                made.append(bench.make(PROMPTS[p], rng.randrange(1, 33), after=made[0].sequence, **fields))
            try:
                bench.engine.submit(*(heard.sequence for heard in made))
            except errors.QueueFull:
                continue
            if rng.random() < 0.3:
                time.sleep(rng.choice([0, 0.01]))
                bench.engine.cancel(rng.choice(made).sequence)
            for heard in made:
                reason = heard.wait().reason
                assert heard.new == known[p, v, k][: len(heard.new)], "a text of mixed versions"
                assert reason is not Reason.LENGTH or len(heard.new) == heard.sequence.max_tokens
                assert sum(output.reason is not None for output in heard.outputs) == 1
                reasons[reason] += 1

    def guarded(seed: int) -> None:
        try:
            client(seed)
        except BaseException as error:  # told below
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.engine.stop()
    assert not wrong, wrong
    assert min(reasons[r] for r in (Reason.LENGTH, Reason.CANCELLED, Reason.DEADLINE, Reason.SUPERSEDED)) > 5, reasons
    assert bench.engine.preemptions > 0 and bench.engine.drafted_tokens[1] > 0
    assert bench.engine.load == (0, 0) and bench.engine.blocks_held == 0
    assert not bench.sampler._generators, "random generators of ended sequences"
