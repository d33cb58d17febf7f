"""A tiny random-weight base in a folder, and runs over a few lines of code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from services.cli.local import ports
from services.core.models import prompts
from services.trainer.corpus.data import Corpus, Document
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut
from services.trainer.ranks import ALONE
from tests.unit.inference.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[3]
SMALL: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8.0,
    "lora_init_scale": None,
    "lora_dropout": 0.0,
    "target_modules": ("q_proj", "v_proj", "down_proj"),
    "learning_rate": 1e-2,
    "batch_size": 4,
    "micro_batch_size": 2,
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "train_steps": 12,
    "decay_steps": 10,
    "low_gpu_memory_mode": False,
    "context_length": 64,
    "fim_rate": 0.0,
    "seed": 7,
    "time_limit_seconds": None,
    "early_stopping_patience": 0,
    "eval_steps": 4,
    "checkpoint_steps": 6,
    "max_eval_tokens": 4096,
    "max_grad_norm": 1.0,
    "keep_checkpoints": 3,
    "max_foreign_loss_increase": 0.02,
    "proof_places": 24,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of the base model."""
    folder = tmp_path_factory.mktemp("base")
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings() -> Callable[..., Settings]:
    return lambda **changed: Settings(**{**SMALL, **changed})


@pytest.fixture
def trainee(base: Path) -> Callable[[Settings], Trainee]:
    """In fp32: what is compared here must not drown in rounding."""
    return lambda settings: Trainee(base, settings, device=torch.device("cpu"), dtype=torch.float32)


def documents(count: int = 6, source: str = "projects/p/sources/s") -> list[Document]:
    return [
        Document(f"f{n}.py", source, f"def add_{n}(left, right):\n    return left + right + {n}\n" * (1 + n % 3))
        for n in range(count)
    ]


@pytest.fixture
def corpus(tokenizer: PreTrainedTokenizerFast) -> Callable[[Settings], Corpus]:
    def make(settings: Settings) -> Corpus:
        return Corpus(
            documents(),
            tokenizer,
            prompts.detect(tokenizer),
            window=settings.context_length,
            fim_rate=settings.fim_rate,
            seed=settings.seed,
        )

    return make


@pytest.fixture
def held_out(tokenizer: PreTrainedTokenizerFast) -> Callable[..., HeldOut]:
    def make(settings: Settings, texts: list[Document] | None = None) -> HeldOut:
        return HeldOut(
            texts or documents(2),
            tokenizer,
            prompts.detect(tokenizer),
            window=settings.context_length,
            max_tokens=settings.max_eval_tokens,
        )

    return make


@pytest.fixture(scope="session")
def found(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank found ("alone"), and each of two; and "told", how a run of two went. See two_ranks.py."""
    from tests.unit.trainer import two_ranks
    from tests.unit.trainer.folders import prepared

    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(base, folder / "base")
    run = prepared(folder / "run", folder / "base")
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports.choose(["group"], {})["group"]),
        "WORLD_SIZE": "2",
    }
    group = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.trainer.two_ranks", str(folder)],
            cwd=ROOT,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        alone = two_ranks.cases(base, ALONE)
        for process in group:
            _, said = process.communicate(timeout=100)
            assert process.returncode == 0, said.decode()[-3000:]
    finally:
        for process in group:
            process.kill()
    told = run.read()[0]
    return {"alone": alone, "told": told, **{str(rank): torch.load(folder / f"rank-{rank}.pt") for rank in range(2)}}
