"""The engine on a GPU: ``python -m bench.gpu [0.5b] [7b]``; both if none. Without a GPU it says so, and that is all.

Shapes of Qwen2.5-Coder with random weights in bfloat16, so that nothing is downloaded. A decode step has to read all
weights, and the keys and values of its streams: what share of the time that takes at the speed at which this GPU copies
memory is the share of the limit. Each figure is of the best half of the steps once all streams decode.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from services.core.models.spelling import Spelling
from services.inference.adapters import lora
from services.inference.engine.engine import Engine
from services.inference.engine.runner import Runner
from services.inference.engine.sampler import Sampler
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Output, Sequence
from services.inference.engine.text import TextStream

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
PROMPT, TOKENS, LONG = 512, 96, 4096
STREAMS = (1, 8, 32)
RANK, BATCH = 16, 8
LIMITS = Limits(running=32, step_tokens=2048, kv_tokens=65536, draft_tokens=0)
_numbers = itertools.count()


class Side:
    """A model of random weights."""

    def __init__(self, shape: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with device:
            model = Qwen2ForCausalLM(Qwen2Config(max_position_embeddings=8192, **shape)).eval()  # type: ignore[no-untyped-call]
        torch.set_default_dtype(torch.float32)
        self.model: PreTrainedModel = model.requires_grad_(False)
        self._vocabulary = [b"%d," % id for id in range(shape["vocab_size"])]
        self._runner = Runner(self.model, Sampler(Spelling(self._vocabulary)), LIMITS.blocks)
        head = self.model.get_output_embeddings().weight
        products = lora.joints(self.model)
        self.weights = sum(joint.weight.nbytes for joint in products) + head.nbytes
        """Bytes that a decode step reads."""
        config = self.model.config
        head_dim = config.hidden_size // config.num_attention_heads
        self.token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * head.element_size()
        """Bytes of a token's keys and values."""

    def decode(self, count: int, adapters: list[lora.Weights] | None = None) -> float:
        """Seconds of a step of so many streams."""
        with self._engine() as engine:
            inboxes = [
                self._submit(engine, PROMPT, TOKENS, adapter=adapters[n % len(adapters)] if adapters else None)
                for n in range(count)
            ]
            times = [_drain(inbox) for inbox in inboxes]
        # All of the last ones are in the same steps.
        gaps = sorted(after - before for before, after in itertools.pairwise(times[-1][TOKENS // 4 :]))
        return statistics.mean(gaps[: len(gaps) // 2])

    def prefill(self) -> float:
        """Seconds to the first token of a long prompt."""
        with self._engine() as engine:
            began = time.perf_counter()
            return _drain(self._submit(engine, LONG, 1))[0] - began

    def adapter(self, seed: int) -> lora.Weights:
        """One of all linear layers."""
        generator = torch.Generator().manual_seed(seed)
        pairs = {
            path: tuple(torch.randn(size, generator=generator) * 0.02 for size in ((RANK, width), (out, RANK)))
            for path, (out, width) in lora.adaptable(self.model).items()
        }
        ready = lora.prepare(pairs, 1.0, self.model.dtype, self.model.device, sha256=str(seed))  # type: ignore[arg-type]
        self._runner.stage(ready)
        return ready

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Every operation is started by Python, as on a CPU."""
        graphs, self._runner._graphs = self._runner._graphs, None
        yield
        self._runner._graphs = graphs

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        engine = Engine(self._runner, LIMITS)
        engine.start()
        yield engine
        engine.stop()

    def _submit(self, engine: Engine, length: int, tokens: int, **fields: Any) -> queue.Queue[tuple[float, Output]]:
        inbox: queue.Queue[tuple[float, Output]] = queue.Queue()
        generator = torch.Generator().manual_seed(next(_numbers))
        ids = torch.randint(len(self._vocabulary), (length,), generator=generator).tolist()
        text = TextStream(self._vocabulary)
        engine.submit(Sequence(ids, tokens, text, lambda output: inbox.put((time.perf_counter(), output)), **fields))
        return inbox


def _drain(inbox: queue.Queue[tuple[float, Output]]) -> list[float]:
    """When each output came that has something in it."""
    times, ended = list[float](), False
    while not ended:
        at, output = inbox.get(timeout=600)
        ended = output.reason is not None
        if not output.started:
            times.append(at)
    return times


def copied(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second that a copy within the memory reads and writes, at best."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * size / (time.perf_counter() - began))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(name: str, shape: dict[str, Any], device: torch.device) -> None:
    """Prints all figures of a shape."""
    speed, side = copied(device), Side(shape, device)
    print(f"{name}: {side.weights / 1e9:.2f} GB are read a step; this memory copies {speed / 1e9:.0f} GB/s")
    side.prefill()  # the first takes memory and loads kernels
    seconds = min(side.prefill() for _ in range(3))
    print(f"{name}, prefill of {LONG} tokens: {LONG / seconds:.0f} tokens/s")
    for count in STREAMS:
        with side.without_graphs():
            eager = side.decode(count)
        step = side.decode(count)
        read = side.weights + count * side.token * (PROMPT + TOKENS * 5 // 8)
        print(
            f"{name}, {count} streams: {count / step:.0f} tokens/s, {step * 1e3:.2f} ms a step, "
            f"{read / speed / step:.0%} of the limit; without graphs {count / eager:.0f} ({eager / step:.2f} x as long)"
        )
    adapters = [side.adapter(seed) for seed in range(BATCH)]
    base, one, all_of_them = (side.decode(BATCH, which) for which in (None, adapters[:1], adapters))
    print(
        f"{name}, {BATCH} streams on adapters of rank {RANK}: one {one / base - 1:+.0%}, {BATCH} different "
        f"{all_of_them / base - 1:+.0%} over base, {all_of_them / one - 1:+.0%} over one (asked: +20 %, +45 %, +15 %)"
    )
    if device.type == "cuda":
        print(f"{name}: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most")
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", choices=[*SHAPES, []], help="what to measure; both when none is named")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in asked.shapes or SHAPES:
        measure(name, SHAPES[name], torch.device("cuda", 0))


if __name__ == "__main__":
    main()
