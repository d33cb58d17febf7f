"""Whole steps on a device that is not the CPU and cannot be asked for a number: what would fail or wait on a GPU.

torch's "meta" tensors have a device, a type and a size. An operation on one of them and one of the CPU's, or that needs
a number of theirs, is an error here, as it would be on a GPU or would make it wait.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from services.core.models.spelling import token_bytes
from services.inference.adapters import lora
from services.inference.engine.runner import Runner
from services.inference.engine.scheduler import Limits, Scheduler
from services.inference.engine.sequence import Sequence
from services.inference.engine.speculate import Drafter
from services.inference.engine.text import TextStream
from tests.unit.inference.tape import Recorder, Tape, waits
from tests.unit.inference.test_architectures import CONFIGS, PROMPTS, small

_aten = torch.ops.aten
META = torch.device("meta")
CODE = ("smollm2", "starcoder2", "granite-code-20b", "granite", "qwen3", "gemma2")
"""One for each code of layers: Llama, Qwen2 and Mistral share ours."""
_MOVES = {_aten.copy_.default, _aten._to_copy.default}


class OneDevice(TorchDispatchMode):
    """No operation may use tensors of two devices but a copy; single numbers of the CPU are passed by value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for tensor in used if tensor.ndim or tensor.device == META}
        assert len(devices) < 2 or func in _MOVES, f"{func} of tensors of {devices}"
        assert META not in devices or not waits(func, args), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class AnyToken:
    """In the sampler's place, which has to wait for the logits."""

    def sample(self, logits: torch.Tensor, sequences: list[tuple[Sequence, tuple[int, ...]]]) -> list[tuple[int, ...]]:
        assert logits.device == META and len(logits) == sum(len(drafts) + 1 for _, drafts in sequences)
        return [(number % 200,) for number in range(len(sequences))]


class Guessing(Drafter):
    def draft(self, tokens: list[int], most: int, price: float) -> tuple[int, ...]:
        return tuple(tokens[: len(tokens) % 3 * 2][:most])


def adapter(model: Any, rank: int) -> lora.Weights:
    pairs = {path: (torch.ones(rank, i), torch.ones(o, rank)) for path, (o, i) in lora.adaptable(model).items()}
    return lora.prepare(pairs, 2.0, model.dtype, model.device, sha256=f"of rank {rank}")


@pytest.mark.parametrize("name", CODE)
def test_a_step_needs_nothing_of_the_cpu(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    recorder, limits = Recorder(), Limits(running=5, step_tokens=40, kv_tokens=2048, draft_tokens=5)
    vocabulary, sampler = token_bytes(tokenizer), AnyToken()
    for record in (None, recorder):
        model = small(copy.deepcopy(CONFIGS[name]), len(tokenizer)).to(torch.bfloat16).to("meta")  # type: ignore[arg-type]
        runner, scheduler = Runner(model, sampler, limits.blocks, record=record), Scheduler(limits)  # type: ignore[arg-type]
        adapters = [None, *(adapter(model, rank) for rank in (4, 8, 20))]
        with OneDevice():
            runner.begin()
            for weights in adapters[1:]:
                runner.stage(weights)
            assert runner.probe(adapters[1], [1, 2, 3]).device == META
            for number, prompt in enumerate(PROMPTS):
                sequence = Sequence(prompt, 4, TextStream(vocabulary), print, adapter=adapters[number % 4])
                sequence.drafter = Guessing()
                scheduler.submit(sequence)
            while len(scheduler):
                plan = scheduler.plan(0.0)
                results = runner.step(plan.work)
                ended = [
                    item.sequence
                    for item, result in zip(plan.work, results, strict=True)
                    if result and (output := item.sequence.take(result)) and output.reason
                ]
                scheduler.commit(plan.work, results)
                scheduler.remove(ended, 0.0)
        assert scheduler.right_tokens < scheduler.drafted_tokens and scheduler.generated_tokens == 4 * len(PROMPTS)
    assert recorder.made > 3


def test_the_guards_see_what_they_are_there_for() -> None:
    there, here = torch.empty(4, device=META), torch.ones(4)
    for wrong in (lambda: there + here, lambda: there.index_select(0, torch.tensor([1])), lambda: bool(there.sum())):
        with OneDevice(), pytest.raises((AssertionError, RuntimeError)):
            wrong()
    for wrong in (lambda: bool(here.sum()), lambda: here[here > 0], lambda: here * torch.tensor([2.0])):
        with Tape(), pytest.raises(AssertionError):
            wrong()
