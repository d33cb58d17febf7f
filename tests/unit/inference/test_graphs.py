"""Recorded steps against steps that are not: the same tokens, whatever runs side by side."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from services.inference.adapters.indexed import Indexed
from services.inference.adapters.lora import Weights
from services.inference.engine import graphs
from services.inference.engine.blocks import BLOCK
from services.inference.engine.graphs import Bucket
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Sampling
from tests.unit.inference.tape import Recorder
from tests.unit.inference.test_architectures import CONFIGS, PROMPTS, small
from tests.unit.inference.tiny import Bench, Heard, Knowing, marker

LIMITS = Limits(running=5, step_tokens=40, kv_tokens=2048, draft_tokens=5)
TOKENS = 11


@pytest.fixture(autouse=True)
def nothing_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_USUAL", [])


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def recorded(reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recorder: Recorder) -> Iterator[Bench]:
    bench = Bench(reference, tokenizer, replace(LIMITS, draft_tokens=0), record=recorder)
    bench.engine.start()
    yield bench
    bench.engine.stop()
    assert bench.engine.blocks_held == 0


def kept(bench: Bench) -> list[Bucket]:
    assert bench.runner._graphs is not None
    return list(bench.runner._graphs._kept)


def crowd(bench: Bench, adapters: list[Weights | None], known: list[list[int]] | None = None) -> list[list[int]]:
    """New tokens of more sequences than run at once: prompts join while others decode, and they end one by one."""
    made = list[Heard]()
    for number, prompt in enumerate([*PROMPTS, *PROMPTS[::-1]]):
        adapter = adapters[number % len(adapters)]
        made.append(bench.make(prompt, TOKENS - number % 5, adapter=adapter, sampling=Sampling(logprobs=1)))
        if known is not None:
            made[-1].sequence.drafter = Knowing([*prompt, *known[number]], number)
    bench.engine.submit(*(one.sequence for one in made))
    return [one.wait().new for one in made]


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recorder: Recorder | None) -> list[list[int]]:
    bench = Bench(model, tokenizer, LIMITS, record=recorder)
    adapters = [None, marker(bench.model, 1), marker(bench.model, 2), marker(bench.model, 3, rank=9)]
    bench.engine.start()
    plain = crowd(bench, adapters)
    if recorder is not None:
        made = recorder.made
        assert crowd(bench, adapters[1:])[0] != plain[0], "on another adapter"
        assert recorder.played > 3 * made
        known = [tokens + [0] * TOKENS for tokens in plain]
        assert crowd(bench, adapters, known) == plain, "with guesses"
        right, drafted = bench.engine.drafted_tokens
        assert 10 < right < drafted
        assert len({b.rows for b in kept(bench)}) > 1 < len({b.width for b in kept(bench)})
    bench.engine.stop()
    return plain


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_steps_that_are_not_recorded(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = small(CONFIGS[name], len(tokenizer))
    assert run(model, tokenizer, Recorder()) == run(model, tokenizer, None)


def test_what_fills_up_and_what_others_left_changes_nothing(recorded: Bench, bench: Bench) -> None:
    runner = recorded.runner
    assert runner._graphs is not None
    adapters = [marker(recorded.model, seed) for seed in range(3)]
    expected = [
        bench.submit(prompt, TOKENS - number % 5, adapter=[None, *adapters][number % 4]).wait().new
        for number, prompt in enumerate([*PROMPTS, *PROMPTS[::-1]])
    ]
    runner._graphs._memory.fill_(torch.nan)  # as if others had left it in every block
    assert crowd(recorded, [None, *adapters]) == expected
    runner._graphs._memory[:, :, :, -BLOCK:] = torch.nan  # of the block that is nobody's
    for adapter in adapters:
        runner.stage(adapter)
    stack = runner._active._mixer._stacks[8]
    with torch.inference_mode():
        for memory in (*stack.a.values(), *stack.b.values()):
            memory[3:] = torch.nan  # of slots that are nobody's, or of an adapter that is no number
    assert crowd(recorded, [None, *adapters]) == expected
    assert any(bucket.stacks and bucket.stacks[0][2] > 3 for bucket in kept(recorded))


def test_an_adapter_that_comes_or_goes_wants_no_new_recording(
    recorded: Bench, recorder: Recorder, tokenizer: PreTrainedTokenizerFast, reference: LlamaForCausalLM
) -> None:
    bench = Bench(reference, tokenizer, LIMITS)
    bench.engine.start()
    versions = [marker(recorded.model, seed) for seed in range(19)]
    for adapter in versions[:16]:  # as many as have slots
        recorded.runner.stage(adapter)
    told, made = list[list[int]](), list[int]()
    for adapter in versions:  # the last ones take slots of the first
        recorded.runner.stage(adapter)
        told.append(recorded.submit(PROMPTS[3], 12, adapter=adapter).wait().new)
        made.append(recorder.made)
        assert told[-1] == bench.submit(PROMPTS[3], 12, adapter=adapter).wait().new
    assert len({tuple(tokens) for tokens in told}) == len(versions)
    assert made[-1] == made[15] and {b.stacks[0][1] for b in kept(recorded)} == {16}
    bench.engine.stop()


def test_a_stack_that_grew_gets_new_recordings_and_its_old_memory_goes(recorded: Bench, recorder: Recorder) -> None:
    mixer = recorded.runner._active._mixer
    adapters = [marker(recorded.model, seed) for seed in range(9)]
    for adapter in adapters[:8]:
        recorded.runner.stage(adapter)
    expected = [recorded.submit(PROMPTS[1], 12, adapter=adapter).wait().new for adapter in adapters[:8]]
    mixer._stacks[8]._mixed = {adapter.digest for adapter in adapters[:8]}  # as if a step read all of them now
    recorded.runner.stage(adapters[8])
    assert mixer._stacks[8].memory().size == 16
    assert [recorded.submit(PROMPTS[1], 12, adapter=one).wait().new for one in adapters[:8]] == expected
    assert {bucket.stacks[0][1] for bucket in kept(recorded)} == {16}


def test_steps_on_the_base_model_pay_for_no_adapter(recorded: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = marker(recorded.model, 1)
    recorded.submit(PROMPTS[1], 8, adapter=adapter).wait()
    assert all(bucket.stacks for bucket in kept(recorded))
    monkeypatch.setattr(Indexed, "add", lambda *_: pytest.fail("an adapter's product"))
    recorded.submit(PROMPTS[1], 8).wait()
    assert not all(bucket.stacks for bucket in kept(recorded))


def test_no_more_are_kept_than_may_be(recorded: Bench, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = crowd(recorded, [None])
    assert len(kept(recorded)) > 3
    monkeypatch.setattr(graphs, "_MOST", 3)
    monkeypatch.setattr(graphs, "_SHORTEST", 1)
    for _ in range(2):
        assert crowd(recorded, [None]) == expected
        assert len(kept(recorded)) == 3
    assert recorder.made > 8


def test_large_steps_and_pieces_of_prompts_are_not_recorded(recorded: Bench, recorder: Recorder) -> None:
    recorded.submit([7] * 80, 1).wait()
    assert recorder.made == 0
    recorded.submit([8] * 85, 3).wait()
    assert [(bucket.width, bucket.blocks) for bucket in kept(recorded)] == [(8, 16), (1, 16)], (
        "the last five tokens are few"
    )
    assert (recorder.made, recorder.played) == (2, 3)


def test_what_cannot_be_recorded_is_computed_as_ever(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, bench: Bench
) -> None:
    tries = list[int]()

    def fail(compute: Callable[[], None]) -> Any:
        tries.append(1)
        compute()
        raise RuntimeError("operation not permitted when stream is capturing")

    broken = Bench(reference, tokenizer, Limits(running=4, waiting=6, step_tokens=16, kv_tokens=2048), record=fail)
    broken.engine.start()
    assert broken.submit(PROMPTS[1], 12).wait().new == bench.submit(PROMPTS[1], 12).wait().new
    assert tries == [1], "once is enough"
    broken.engine.stop()


def test_the_usual_ones_are_made_before_the_first_step(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_USUAL", [(1, 1, 16), (2, 1, 16), (16, 1, 128)])
    bench = Bench(reference, tokenizer, LIMITS, record=recorder)
    bench.runner.begin()
    assert kept(bench) == [Bucket(1, 1, 16), Bucket(2, 1, 16)], "the last one is larger than the cache"
    bench.engine.start()
    bench.submit([5], 3).wait()
    bench.engine.stop()
    assert recorder.made == 2


def test_nothing_is_recorded_on_a_cpu(bench: Bench) -> None:
    assert bench.runner._graphs is None


def test_who_uses_the_device_beside_the_steps_and_recordings_wait_for_each_other(recorded: Bench) -> None:
    with recorded.runner.beside:
        heard = recorded.submit([5], 4).wait(lambda output: output.started)
        with pytest.raises(queue.Empty):
            heard.inbox.get(timeout=0.1)
    heard.wait()
