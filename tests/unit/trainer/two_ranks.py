"""One rank of a group that trains the tiny model in several ways; its findings go into a file.

``python -m tests.unit.trainer.two_ranks FOLDER`` with torchrun's variables; FOLDER/base is the model, and FOLDER/run a
folder that is prepared for training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from services.core.errors import JobCancelled
from services.core.models import prompts
from services.core.places import Place
from services.trainer import loop, rank
from services.trainer.corpus.data import Corpus
from services.trainer.launch.folder import RunFolder
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut
from services.trainer.proving.generate import LineWriter
from services.trainer.proving.proof import Exam, Measures
from services.trainer.ranks import Ranks, joined
from services.trainer.state import State
from services.trainer.story import Evaluated, StepDone
from tests.unit.inference.tiny import make_tokenizer
from tests.unit.trainer.conftest import SMALL, documents

ODD = Settings(**{**SMALL, "batch_size": 5, "train_steps": 6, "eval_steps": 3, "learning_rate": 1e-3})
"""Five rows on two ranks: one of them gets a row less."""


PLACES = [
    Place(f"{number}.py", f"def add_{number}(left, right):\n    return ", "\n", f"left + right + {number}")
    for number in range(5)
]
"""Five places on two ranks: one of them writes a line less."""


class Case:
    """A run of the tiny model in fp32, like every time."""

    def __init__(self, base: Path, settings: Settings, ranks: Ranks, *, sharded: bool = False) -> None:
        tokenizer = make_tokenizer()
        fmt = prompts.detect(tokenizer)
        self.settings, self.ranks, self.state = settings, ranks, State()
        self.trainee = Trainee(
            base,
            settings,
            device=torch.device("cpu"),
            dtype=torch.float32,
            shards=ranks.size if sharded else 1,
        )
        self.corpus = Corpus(documents(), tokenizer, fmt, window=64, fim_rate=0.0, seed=settings.seed)
        self.held_out = HeldOut(
            [*documents(2), *documents(3, "projects/p/sources/t")], tokenizer, fmt, window=64, max_tokens=4096
        )

    def gradients(self) -> dict[str, Any]:
        """Loss and gradients of the first batch, with B moved away from zero so that A gets gradients too."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for master in self.trainee.masters.values():
                master.add_(torch.randn(master.shape, generator=generator) * 0.05)
        self.trainee.publish()
        rows = self.corpus.batch(0, self.settings.batch_size)
        tokens = sum(len(row.ids) for row in rows)
        loss = sum(self.trainee.accumulate([row], tokens) for row in self.ranks.share(rows))
        self.trainee.take_gradients()
        self.ranks.sum_gradients(self.trainee.masters.values())
        grads = {name: master.grad for name, master in self.trainee.masters.items()}
        return {"loss": self.ranks.sum([loss])[0] / tokens, "gradients": grads}

    def lines(self, is_cancelled: Callable[[], bool] = lambda: False, *, apart: bool = True) -> dict[str, Any]:
        """The proof's measures, and how many of its lines this rank wrote."""
        tokenizer = make_tokenizer()
        writer = LineWriter(tokenizer, prompts.detect(tokenizer), budget=64)
        exam = Exam(writer, PLACES, PLACES[:1], None, apart=apart)
        measures, generate, counts = Measures(0.0, []), self.trainee.generate, []

        def counting(starts: Any, choose: Any) -> None:
            counts.append(len(starts))
            generate(starts, choose)

        self.trainee.generate = counting  # type: ignore[method-assign]
        cancelled = False
        try:
            exam.add_lines(self.trainee, measures, is_cancelled, self.ranks)
        except JobCancelled:
            cancelled = True
        measured = measures.next_lines, measures.middles
        return {"measured": measured, "written": sum(counts), "cancelled": cancelled}

    def run(self, is_cancelled: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Losses and the adapter at the end."""
        optimizer = loop.make_optimizer(self.trainee, self.settings)
        steps, tests = [], []
        cancelled = False
        try:
            for event in loop.train(
                self.trainee,
                optimizer,
                self.settings,
                self.corpus,
                self.held_out,
                self.state,
                is_cancelled,
                ranks=self.ranks,
            ):
                if isinstance(event, StepDone):
                    steps.append(event.train_loss)
                elif isinstance(event, Evaluated):
                    tests.append([event.test.loss, *event.test.by_source.values()])
        except JobCancelled:
            cancelled = True
        masters = {name: master.detach().clone() for name, master in self.trainee.masters.items()}
        end = {"step": self.state.step, "ended": self.state.ended, "cancelled": cancelled}
        return {"steps": steps, "tests": tests, "masters": masters, **end}


def cases(base: Path, ranks: Ranks) -> dict[str, Any]:
    """What is compared between one rank and two."""
    return {
        "gradients": Case(base, ODD, ranks).gradients(),
        "run": Case(base, ODD, ranks).run(),
        "lines": Case(base, ODD, ranks).lines(),
    }


def main(folder: Path) -> None:
    """Everything that two ranks do."""
    torch.set_num_threads(1)
    base = folder / "base"
    low_memory = Settings(**{**SMALL, "batch_size": 5, "low_gpu_memory_mode": True})
    endless = {**SMALL, "train_steps": 1_000_000, "decay_steps": 100, "eval_steps": 1_000_000}
    with joined() as ranks:
        found = cases(base, ranks)
        found["sharded gradients"] = Case(base, low_memory, ranks, sharded=True).gradients()
        sharded = Case(base, ODD, ranks, sharded=True)
        found["sharded run"] = sharded.run()
        layers = sharded.trainee._base.base_model.layers
        found["sharded lines"] = sharded.lines(apart=False)
        found["held"] = sum(p.to_local().numel() for p in layers.parameters() if hasattr(p, "to_local"))
        asked = iter(range(1_000_000))
        only_second = ranks.rank == 1
        found["cancelled"] = Case(base, Settings(**endless), ranks).run(lambda: only_second and next(asked) > 20)
        asked = iter(range(1_000_000))
        found["cancelled lines"] = Case(base, ODD, ranks).lines(lambda: only_second and next(asked) > 2)
        late = Case(base, Settings(**{**endless, "time_limit_seconds": 1e6}), ranks)
        late.state.seconds = 2e6 * only_second
        found["late"] = late.run()
        rank.train(RunFolder(folder / "run"), ranks)
    torch.save(found, folder / f"rank-{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end
