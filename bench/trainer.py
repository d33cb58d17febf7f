"""Benchmarks of training: ``python -m bench.trainer [speed] [memory]``; both when none is named.

transformers' Trainer with PEFT is the peer. Every side is a process of its own and trains the same rows, sources of an
installed package; the sides take turns, so that what else the machine does meets them all.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = 1024
RANK = 16
LEARNING_RATE = 5e-4
ROUNDS = 5
STEPS = 2
"""Of each side in a round."""
PACKAGE = "minio"
MATMUL_SIZE = 2048

Ids = list[list[int]]
Step = Callable[[], float]
"""Trains one batch and returns its loss in nats per token."""


def ours(rows: Ids, *, low: bool) -> Iterator[Step | None]:
    """The trainer's own loop; yields once when all is imported, then its steps."""
    import torch

    from services.core.models import catalogue, weights
    from services.trainer import loop
    from services.trainer.corpus.data import Row
    from services.trainer.model.lora import Trainee
    from services.trainer.planning.settings import Settings
    from services.trainer.state import State

    yield None
    settings = Settings(
        lora_r=RANK,
        lora_alpha=2.0 * RANK,
        lora_init_scale=None,
        lora_dropout=0.0,
        target_modules=(),
        learning_rate=LEARNING_RATE,
        batch_size=1,
        micro_batch_size=1,
        warmup_steps=0,
        weight_decay=0.0,
        train_steps=10**6,
        decay_steps=10**6,
        low_gpu_memory_mode=low,
        context_length=CONTEXT,
        fim_rate=0.0,
        seed=0,
        time_limit_seconds=None,
        early_stopping_patience=0,
        eval_steps=10**6,
        checkpoint_steps=10**6,
        max_eval_tokens=CONTEXT,
        max_grad_norm=1.0,
        keep_checkpoints=1,
        max_foreign_loss_increase=0.02,
        proof_places=0,
    )

    class Rows:
        """What the loop asks of a corpus. One document a row: the peer knows no other."""

        def batch(self, step: int, size: int) -> list[Row]:
            chosen = [rows[(step * size + offset) % len(rows)] for offset in range(size)]
            return [Row(ids[:-1], ids[1:], list(range(len(ids) - 1))) for ids in chosen]

    base = weights.ensure_weights(catalogue.find(""), _cache())
    trainee = Trainee(base, settings, device=torch.device("cpu"))
    anything: Any = Rows()
    state = State(base_loss=0.0)  # the base is not evaluated
    story = loop.train(
        trainee, loop.make_optimizer(trainee, settings), settings, anything, anything, state, lambda: False
    )

    def step() -> float:
        done: Any = next(story)
        return float(done.train_loss)

    yield step


def peer(rows: Ids, *, low: bool) -> Iterator[Step | None]:
    """transformers' Trainer with PEFT as their manuals say, in the type that this processor is quick with."""
    import threading
    from queue import Queue

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from services.core.models import catalogue, weights

    yield None
    asked: Queue[None] = Queue()
    told: Queue[float] = Queue()

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            asked.get()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:  # type: ignore[override]
            told.put(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> None:
            return None

    def train() -> None:
        # All of it in one thread: a second team of OpenMP's in the process makes both wait for the kernel.
        base = weights.ensure_weights(catalogue.find(""), _cache())
        # The type that this processor is quick with, as ours.
        dtype = weights.quick_dtype("cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        arguments = TrainingArguments(
            output_dir="/nonexistent",
            per_device_train_batch_size=1,
            max_steps=10**6,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=dtype == torch.bfloat16,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        data = [{"input_ids": ids[:CONTEXT], "labels": ids[:CONTEXT]} for ids in rows]
        InOrder(model=model, args=arguments, train_dataset=data, callbacks=[Turns()]).train()

    threading.Thread(target=train, daemon=True).start()

    def step() -> float:
        asked.put(None)
        return told.get()

    yield step


def matmul(rows: Ids, *, low: bool) -> Iterator[Step | None]:
    """What this machine can do at most: one product of square matrices."""
    import torch

    from services.core.models import weights

    yield None
    dtype = weights.quick_dtype("cpu")
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype) for _ in range(2))

    def step() -> float:
        for _ in range(20):
            a @ b
        return 0.0

    yield step


def _cache() -> Path:
    return Path.home() / ".cache/codegraft"


def _memory(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1000


def _serve(make: Callable[..., Iterator[Step | None]], rows: Ids, low: bool, pipe: Connection) -> None:
    """A side's process: steps when asked, and at the end its memory in MB, before the model was loaded and at most."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # the Trainer prints every loss
    stages = make(rows, low=low)
    next(stages)
    before = _memory("VmRSS")
    step = next(stages)
    assert step is not None
    pipe.send(None)
    while pipe.recv():
        losses = []
        began = time.perf_counter()
        for _ in range(STEPS):
            losses.append(step())
        pipe.send((time.perf_counter() - began, losses))
    pipe.send((before, _memory("VmHWM")))
    pipe.recv()


@dataclass
class Side:
    """One process and what it measured."""

    make: Callable[..., Iterator[Step | None]]
    low: bool = False
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    losses: list[float] = field(default_factory=list)
    before: float = 0.0
    """MB, resident before the model was loaded."""
    peak: float = 0.0
    """MB, resident at most."""

    def start(self, rows: Ids) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(self.make, rows, self.low, other), daemon=True)
        self.process.start()
        other.close()  # a side that fails ends the bench, and does not leave it waiting
        self.pipe.recv()

    def round(self) -> None:
        self.pipe.send(True)
        seconds, losses = self.pipe.recv()
        self.seconds.append(seconds)
        self.losses += losses

    def end(self) -> None:
        self.pipe.send(False)
        self.before, self.peak = self.pipe.recv()
        self.process.kill()

    @property
    def rate(self) -> float:
        """Tokens a second, in the best round."""
        return STEPS * CONTEXT / min(self.seconds[1:])

    def against(self, other: Side) -> tuple[float, float]:
        """How many times the other's time this side took: median of the rounds, and of the best rounds of each."""
        both = zip(self.seconds[1:], other.seconds[1:], strict=True)
        return statistics.median(a / b for a, b in both), min(self.seconds[1:]) / min(other.seconds[1:])


def _run(sides: dict[str, Side], rounds: int) -> None:
    rows = _rows(STEPS * (rounds + 1))
    print(f"{rounds} rounds of {STEPS} steps of {CONTEXT} tokens, r {RANK}, all linear layers; after one to warm up")
    try:
        for side in sides.values():
            side.start(rows)
        for _ in range(rounds + 1):
            for side in sides.values():
                side.round()
        for side in sides.values():
            side.end()
    finally:
        for side in sides.values():
            if hasattr(side, "process"):
                side.process.kill()


def _rows(count: int) -> Ids:
    """So many pieces of the package's sources, each a token longer than the context."""
    from services.core.models import catalogue, weights

    tokenizer = weights.load_tokenizer(weights.ensure_weights(catalogue.find(""), _cache()))
    (folder,) = importlib.util.find_spec(PACKAGE).submodule_search_locations  # type: ignore[union-attr,misc]
    text = "".join(path.read_text() for path in sorted(Path(folder).rglob("*.py")))
    ids = tokenizer(text[: 20 * CONTEXT * count]).input_ids
    return [ids[start : start + CONTEXT + 1] for start in range(0, count * CONTEXT, CONTEXT)]


def speed() -> None:
    """Tokens a second against the peer and against the rate of matrix products."""
    sides = {"matmul": Side(matmul), "peer": Side(peer), "ours": Side(ours)}
    _run(sides, ROUNDS)
    products = 20 * STEPS * 2 * MATMUL_SIZE**3 / min(sides["matmul"].seconds)
    parameters = 134_515_008
    print(f"  matrix products            {products / 1e9:7.0f} GFLOP/s")
    print(f"  Trainer with PEFT          {sides['peer'].rate:7.0f} tokens/s")
    print(f"  ours                       {sides['ours'].rate:7.0f} tokens/s")
    median, best = sides["peer"].against(sides["ours"])
    print(f"  against the peer           {median:7.2f} (best rounds {best:.2f}; asked: 2)")
    print(f"  of the products' rate      {4 * parameters * sides['ours'].rate / products:7.0%} (asked: 45 %)")
    print(f"  losses: ours {_few(sides['ours'].losses)}, the peer's {_few(sides['peer'].losses)}")


def memory() -> None:
    """Peak memory against the peer; low memory mode against the normal one."""
    sides = {
        "Trainer with PEFT": Side(peer),
        "ours": Side(ours),
        "ours, low memory": Side(ours, low=True),
    }
    _run(sides, ROUNDS - 3)
    for name, side in sides.items():
        print(
            f"  {name:24} peak {side.peak:5.0f} MB, {side.peak - side.before:5.0f} over what is there before the model"
            f"   {side.rate:4.0f} tokens/s"
        )
    plain, normal, low = sides.values()
    over = [side.peak - side.before for side in (plain, normal, low)]
    median, best = low.against(normal)
    print(
        f"  ours against the peer      {normal.peak / plain.peak:7.0%}, over that {over[1] / over[0]:.0%} (asked: 50 %)"
    )
    print(
        f"  low memory against normal  {low.peak / normal.peak:7.0%}, over that {over[2] / over[1]:.0%} (asked: 55 %)"
    )
    print(f"  its time                   {median:7.2f} (best rounds {best:.2f}; asked: at most 1.5)")
    apart = max(abs(a - b) for a, b in zip(normal.losses, low.losses, strict=True))
    print(f"  its losses                 {apart:7.4f} apart at most, of {_few(normal.losses)}")


def _few(losses: list[float]) -> str:
    return " ".join(f"{loss:.3f}" for loss in losses[:: max(1, len(losses) // 5)])


if __name__ == "__main__":
    known = {"speed": speed, "memory": memory}
    for name in sys.argv[1:] or known:
        known[name]()
