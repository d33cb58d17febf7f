"""What is loaded once for a run: model, adapter, corpus, test set. Needs torch; runs in a thread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan
from services.core.errors import EmptyDataset
from services.core.models import catalogue, prompts, weights
from services.core.models.catalogue import ModelSpec
from services.trainer import checkpoint, data, loop, machine
from services.trainer.config import TrainerSettings
from services.trainer.data import Corpus
from services.trainer.evaluate import HeldOut
from services.trainer.loop import State
from services.trainer.lora import Trainee
from services.trainer.plan import plan
from services.trainer.settings import Settings


@dataclass(slots=True)
class Loaded:
    """A run ready to train."""

    settings: Settings
    plan: Plan
    trainee: Trainee
    optimizer: torch.optim.AdamW
    corpus: Corpus
    held_out: HeldOut
    state: State
    base_digest: str
    prompt_format: str


def load(
    spec: ModelSpec,
    config: TrainerSettings,
    requested: Hyperparameters,
    train: Path,
    test: Path,
    *,
    planned: Plan | None,
    resume: Path | None,
) -> Loaded:
    """Loads everything, measures the machine, and resolves the plan.

    Args:
        planned: the plan of an earlier attempt, which is kept: the machine may be another one by now.
        resume: folder of the state to go on from.

    Raises:
        EmptyDataset: a part has no token to learn from.
        InvalidHyperparameter, ModelNotFound.
    """
    if config.trainer_threads:
        torch.set_num_threads(config.trainer_threads)
    device = machine.device(config.trainer_device)
    folder = weights.ensure_weights(spec, config.cache_dir)
    if not spec.parameters:
        # A model of the Hub that the catalogue does not list: its folder tells what the plan needs.
        known = catalogue.find(f"dir:{folder}")
        spec = replace(known, id=spec.id, title=spec.title, source=spec.source)
    tokenizer = weights.load_tokenizer(folder)
    fmt = prompts.detect(tokenizer)
    train_part, test_part = data.read_part(train), data.read_part(test)
    on_gpu = device.type == "cuda"

    def corpus_of(settings: Settings) -> Corpus:
        return Corpus(
            train_part.documents,
            tokenizer,
            fmt,
            window=settings.context_length,
            fim_rate=settings.fim_rate,
            seed=settings.seed,
        )

    def resolve(tokens: int, test_tokens: int, speed: float) -> tuple[Settings, Plan]:
        facts = machine.facts(
            spec,
            train_tokens=tokens,
            train_bytes=0,
            test_tokens=test_tokens,
            base_loss=train_part.base_loss,
            has_fim=fmt.style != "plain",
            speed=speed,
            on_gpu=on_gpu,
        )
        return plan(config.with_defaults(requested), facts)

    if planned is not None:
        settings, told = Settings.from_proto(planned.hyperparameters), planned
        corpus = corpus_of(settings)
        trainee = Trainee(folder, settings, device=device)
    else:
        # The corpus tells the tokens, and one micro-batch the speed; the plan is made of both.
        settings, _ = resolve(1, 1, machine.guess_speed(spec, on_gpu=on_gpu))
        corpus = corpus_of(settings)
        counting = HeldOut(test_part.documents, tokenizer, fmt, window=settings.context_length, max_tokens=2**40)
        settings, _ = resolve(corpus.tokens, counting.tokens, machine.guess_speed(spec, on_gpu=on_gpu))
        trainee = Trainee(folder, settings, device=device)
        _refuse_empty(corpus)
        speed = machine.measure_speed(trainee, corpus, settings, machine.guess_speed(spec, on_gpu=on_gpu))
        settings, told = resolve(corpus.tokens, counting.tokens, speed)
        told.trainable_parameters = trainee.trainable_parameters
    _refuse_empty(corpus)
    held_out = HeldOut(
        test_part.documents, tokenizer, fmt, window=settings.context_length, max_tokens=settings.max_eval_tokens
    )
    if not held_out.tokens:
        raise EmptyDataset("the test files have no token to predict", field="dataset", hint="Mark other files as test.")
    optimizer = loop.make_optimizer(trainee, settings)
    state = checkpoint.load_state(trainee, optimizer, resume) if resume is not None else State()
    return Loaded(
        settings=settings,
        plan=told,
        trainee=trainee,
        optimizer=optimizer,
        corpus=corpus,
        held_out=held_out,
        state=state,
        base_digest=weights.base_digest(folder),
        prompt_format=fmt.name,
    )


def _refuse_empty(corpus: Corpus) -> None:
    if not corpus.has_rows():
        raise EmptyDataset(
            "the train files have no token to learn from", field="dataset", hint="Add sources and scan again."
        )
