"""Guessed tokens, on and off: ``python -m bench.speculation [most guesses a step ...]``.

The local model completes files of the standard library, greedily, behind prompts of about 500 tokens: one stream after
the other, and eight at once. With --cpu-time one thread, and seconds of its processor time, so that others on the
machine hardly count.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any, get_args

import torch

from services.core.models import catalogue, weights
from services.core.models.spelling import Spelling, token_bytes
from services.inference.engine.engine import Engine
from services.inference.engine.layers import Kind, speed_up
from services.inference.engine.runner import Runner
from services.inference.engine.sampler import Sampler
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Output, Sequence
from services.inference.engine.text import TextStream

PROMPT, NEW, FILES, ROUNDS = 500, 48, 8, 1
clock = time.perf_counter


def prompts(tokenizer: Any) -> list[list[int]]:
    """Pieces of files of the standard library, each ending somewhere in the code."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(4).shuffle(paths)
    found = []
    for path in paths:
        ids = tokenizer.encode(path.read_text(), add_special_tokens=False)
        if len(ids) > 3 * PROMPT:
            found.append(ids[PROMPT : 2 * PROMPT])
        if len(found) == FILES:
            break
    return found


class Streams:
    """An engine of its own over the model's one runner; nothing of one measurement is cached for the next."""

    def __init__(self, runner: Runner, vocabulary: list[bytes], drafts: int) -> None:
        self.engine = Engine(runner, Limits(draft_tokens=drafts, step_tokens=512))
        self._vocabulary = vocabulary
        self.engine.start()

    def run(self, prompts: list[list[int]], adapter: Any = None) -> tuple[float, list[Sequence]]:
        """Tokens a second of all together, from when each has its first one to the end of all."""
        inbox: queue.Queue[tuple[int, Output]] = queue.Queue()
        sequences = [
            Sequence(
                prompt=prompt,
                max_tokens=NEW,
                text=TextStream(self._vocabulary),
                deliver=lambda output, n=n: inbox.put((n, output)),  # type: ignore[misc]
                adapter=adapter,
            )
            for n, prompt in enumerate(prompts)
        ]
        self.engine.submit(*sequences)
        waited, begun, tokens = set(range(len(prompts))), set[int](), 0
        begin = end = 0.0
        while waited:
            n, output = inbox.get()
            if len(begun) == len(prompts):
                tokens += output.tokens
                end = clock()
            elif output.tokens:
                begun.add(n)
                begin = clock()
            if output.reason is not None:
                waited.discard(n)
        return tokens / (end - begin), sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "guesses", nargs="*", type=int, default=[0, 7], help="most guesses a step, each setting in turn"
    )
    parser.add_argument("--kind", choices=get_args(Kind), default="bf16", help="of the weights")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its processor time for seconds")
    asked = parser.parse_args()
    if asked.cpu_time:
        global clock
        clock, asked.threads = time.process_time, 1
    measure(asked.guesses, asked.kind, asked.threads)


def measure(settings: list[int], kind: Kind, threads: int) -> None:
    """Prints what each setting gives."""
    torch.set_num_threads(1)
    folder = weights.ensure_weights(catalogue.find(""), Path.home() / ".cache/codegraft")
    model, tokenizer = weights.load_model(folder, torch.bfloat16), weights.load_tokenizer(folder)
    vocabulary = token_bytes(tokenizer)
    texts = prompts(tokenizer)
    runner = Runner(model, Sampler(Spelling(vocabulary)), Limits().blocks, threads)
    speed_up(model, kind)
    print(f"{kind}, {threads} threads, {len(texts)} prompts of {PROMPT} tokens, {NEW} new ones each")
    for streams in (1, 8):
        speeds: dict[int, list[float]] = {drafts: [] for drafts in settings}
        counts: dict[int, tuple[int, int]] = {}
        texts_of: dict[int, list[list[int]]] = {}
        for _ in range(ROUNDS):
            for drafts in settings:
                made = Streams(runner, vocabulary, drafts)
                groups = [texts[n : n + streams] for n in range(0, len(texts), streams)]
                results = [made.run(group) for group in groups]
                speeds[drafts].append(statistics.mean(speed for speed, _ in results))
                counts[drafts] = made.engine.drafted_tokens
                texts_of[drafts] = [s.tokens[PROMPT:] for _, sequences in results for s in sequences]
                made.engine.stop()
        for drafts in settings:
            right, all_ = counts[drafts]
            steps = NEW * len(texts) - right
            same = sum(a == b for a, b in zip(texts_of[drafts], texts_of[settings[0]], strict=True))
            print(
                f"{streams} streams, at most {drafts} guesses: {max(speeds[drafts]):.1f} tokens/s"
                f" ({max(speeds[drafts]) / max(speeds[settings[0]]):.2f}x), {1 + right / steps:.2f} tokens a step,"
                f" {right} of {all_} guesses right, {same} of {len(texts)} texts the same",
                flush=True,
            )


if __name__ == "__main__":
    main()
