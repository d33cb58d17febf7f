"""Threads of arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from services.inference.engine import kernels, runner
from services.inference.engine.cores import reserve
from services.inference.engine.engine import Engine
from services.inference.engine.layout import Layout
from services.inference.engine.scheduler import Limits, Work
from services.inference.engine.sequence import Result
from tests.unit.inference.tiny import Bench, marker


def threads_of_another() -> int:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.get_num_threads).result()


def test_only_who_reserves_them_computes_with_several_threads() -> None:
    def reserved() -> tuple[int, int]:
        reserve(2)
        return torch.get_num_threads(), threads_of_another()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(reserved).result() == (2, 1)
    assert threads_of_another() == 1


def test_the_engines_thread_has_at_first_what_its_runner_was_given(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    bench, found = Bench(reference, tokenizer, Limits(), threads=2), list[int]()

    def step(work: list[Work]) -> list[Result | None]:
        found.append(torch.get_num_threads())
        return compute(work)

    compute, bench.runner.step = bench.runner.step, step  # type: ignore[method-assign]
    for _ in range(2):  # a runner may outlive its engine, and then computes in another thread
        bench.engine = Engine(bench.runner, Limits())
        bench.engine.start()
        bench.submit([1, 2, 3], 1).wait()
        bench.engine.stop()
    assert found == [2, 2] and threads_of_another() == 1


def test_steps_are_computed_with_as_many_threads_as_are_quickest(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, found = Bench(reference, tokenizer, Limits(draft_tokens=0), threads=2), list[int]()
    compute = bench.runner._logits

    def logits(layout: Layout) -> torch.Tensor:
        found.append(torch.get_num_threads())
        clock[0] += 0.3 if found[-1] == 2 else 0.1  # as beside another process
        return compute(layout)

    clock = [0.0]
    monkeypatch.setattr(runner.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench.runner, "_logits", logits)
    bench.engine.start()
    bench.submit([1, 2, 3], 40).wait()
    bench.engine.stop()
    assert found[:4] == [2, 2, 1, 1] and found.count(2) <= 4, "each is tried, and then the quicker one stays"


def test_a_step_in_progress_leaves_half_of_the_cores_once_others_need_them(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, found, asked = Bench(reference, tokenizer, Limits(draft_tokens=0), threads=2), list[int](), list[int]()
    compute, pace = bench.runner._logits, bench.runner._pace
    assert pace is not None

    def crowded() -> int:
        asked.append(torch.get_num_threads())
        return 1 if len(asked) == 2 else 0  # somebody comes while the first step is at its second layer

    def logits(layout: Layout) -> torch.Tensor:
        computed = compute(layout)
        found.append(torch.get_num_threads())
        return computed

    monkeypatch.setattr(pace, "crowded", crowded)
    monkeypatch.setattr(bench.runner, "_logits", logits)
    bench.engine.start()
    bench.submit([1, 2, 3], 2).wait()
    bench.engine.stop()
    assert asked[:2] == [2, 2] and found == [1, 2], "the next step has all of them again"
    assert sum(len(costs) for costs in pace._costs.values()) == 1, "a step of both says nothing"


def test_a_probe_beside_the_steps_has_no_team_of_threads(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(reference, tokenizer, Limits(), threads=2)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(bench.runner.probe, marker(bench.model, 1), [1, 2, 3]).result()
        assert thread.submit(kernels.threads).result() == 1
