"""What is loaded once for a run: model, adapter, corpus, test set. Needs torch; runs in a thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan
from services.core.errors import BaseModelMismatch, EmptyDataset, InvalidHyperparameter, JobCancelled
from services.core.models import catalogue, probe, prompts, weights
from services.core.models.catalogue import ModelSpec
from services.core.models.prompts import PromptFormat, Tokenizer
from services.trainer import checkpoint, loop
from services.trainer.config import TrainerSettings
from services.trainer.corpus import data
from services.trainer.corpus.data import Corpus
from services.trainer.model import isolation
from services.trainer.model.lora import Trainee
from services.trainer.planning import machine, memory
from services.trainer.planning.fit import Fit, find_fit, limited, longest
from services.trainer.planning.initial import explain, inherited
from services.trainer.planning.plan import plan
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut
from services.trainer.proving.proof import Exam
from services.trainer.ranks import ALONE, Ranks
from services.trainer.state import State


@dataclass(slots=True)
class Loaded:
    """A run ready to train."""

    settings: Settings
    plan: Plan
    trainee: Trainee
    optimizer: torch.optim.AdamW
    corpus: Corpus
    held_out: HeldOut
    exam: Exam
    state: State
    base_digest: str
    prompt_format: str
    fim_sentinels: tuple[str, ...]
    """Prefix and suffix marker of an adapter that is taught to fill in the middle; empty with markers of the base."""
    put_initial: Callable[[], None] | None
    """Puts the weights of the adapter that the run starts from on the trainee; None for a fresh one."""
    ranks: Ranks
    sharded: bool
    """Whether the base is spread over the ranks."""
    probe_ids: list[int]
    """Prompt on which checkpoints are compared with what was trained."""


@dataclass(frozen=True, slots=True)
class Initial:
    """The adapter that a run starts from."""

    manifest: AdapterManifest
    folder: Path


def load(
    spec: ModelSpec,
    config: TrainerSettings,
    requested: Hyperparameters,
    train: Path,
    test: Path,
    *,
    device: str,
    planned: Plan | None,
    resume: Path | None,
    initial: Initial | None,
    is_cancelled: Callable[[], bool],
    ranks: Ranks = ALONE,
) -> Loaded:
    """Loads everything, measures the machine, and resolves the plan.

    Args:
        device: where to train: "cpu", "cuda:1", "auto".
        planned: the plan of an earlier attempt, which is kept but for the rows at once and low memory mode: the machine
            may be another one by now, with less memory.
        resume: folder of the state to go on from.
        ranks: the processes that train together; all of them load, and come to the same plan.

    Raises:
        EmptyDataset: a part has no token to learn from.
        BaseModelMismatch: the adapter to start from is another base model's.
        OutOfMemory: it does not fit.
        JobCancelled: it was asked for meanwhile.
        InvalidHyperparameter, ModelNotFound.
        NotSupported: the model cannot be trained on packed rows.
    """
    if config.trainer_threads or ranks.size > 1:
        torch.set_num_threads(config.trainer_threads or max(1, (os.cpu_count() or 1) // ranks.size))
    target = machine.device(device)
    folder = weights.ensure_weights(spec, config.cache_dir)
    began = time.monotonic()  # a download is not the run's time
    base_digest = weights.base_digest(folder)
    asked = requested
    if initial is not None:
        if initial.manifest.base_digest != base_digest:
            raise BaseModelMismatch(
                f"{initial.manifest.name} was trained on other weights of {initial.manifest.base_model}",
                field="initial_checkpoint",
                hint="Start from a checkpoint of the base model as it is now, or from none.",
            )
        requested = inherited(requested, initial.manifest)
    if not spec.parameters:
        # A model of the Hub that the catalogue does not list: its folder tells what the plan needs.
        known = catalogue.find(f"dir:{folder}")
        spec = replace(known, id=spec.id, title=spec.title, source=spec.source)
    tokenizer = cast(Tokenizer, _Interruptible(weights.load_tokenizer(folder), is_cancelled))
    base_format = prompts.detect(tokenizer)
    train_part, test_part = data.read_part(train), data.read_part(test)
    on_gpu = target.type == "cuda"
    guess = ranks.size * machine.guess_speed(spec, on_gpu=on_gpu)
    sharded = machine.shards(spec, target, ranks, config.trainer_sharding)
    sentinels = tuple(initial.manifest.fim_sentinels) if initial is not None else ()

    def corpus_of(settings: Settings) -> Corpus:
        return Corpus(
            train_part.documents,
            tokenizer,
            format_of(base_format, settings, sentinels),
            window=settings.context_length,
            fim_rate=settings.fim_rate,
            seed=settings.seed,
        )

    def make(settings: Settings) -> Trainee:
        return Trainee(folder, settings, device=target, shards=ranks.size if sharded else 1)

    def resolve(tokens: int, test_tokens: int, speed: float) -> tuple[Settings, Plan]:
        facts = machine.facts(
            spec,
            train_tokens=tokens,
            train_bytes=0,
            test_tokens=test_tokens,
            base_loss=train_part.base_loss,
            has_fim=base_format.fills_in_the_middle,
            speed=speed,
            on_gpu=on_gpu,
        )
        return plan(config.with_defaults(requested), facts)

    def fitted(settings: Settings) -> tuple[Trainee, Fit]:
        row = longest(corpus.batch(0, settings.batch_size), settings.context_length)
        trainee, fit = find_fit(
            make,
            row,
            settings,
            may_save=not requested.HasField("low_gpu_memory_mode"),
            is_cancelled=is_cancelled,
            # Ranks that share the layers must try the same, and each sees another amount of free memory.
            free=memory.free if not (on_gpu or sharded) and memory.is_known() else None,
        )
        return trainee, replace(fit, rows=int(ranks.least(fit.rows)), low_memory=ranks.any(fit.low_memory))

    if planned is not None:
        settings, told = Settings.from_proto(planned.hyperparameters), planned
        corpus = corpus_of(settings)
        _refuse_empty(corpus)
        trainee, fit = fitted(settings)
    else:
        # The corpus tells the tokens, and one micro-batch the speed; the plan is made of both.
        settings, _ = resolve(1, 1, guess)
        corpus = corpus_of(settings)
        counting = HeldOut(
            test_part.documents, tokenizer, base_format, window=settings.context_length, max_tokens=2**40
        )
        settings, _ = resolve(corpus.tokens, counting.tokens, guess)
        _refuse_empty(corpus)
        trainee, fit = fitted(settings)
        tried = replace(settings, micro_batch_size=fit.rows)
        speed = machine.measure_speed(trainee, corpus, tried, guess, is_cancelled, ranks)
        settings, told = resolve(corpus.tokens, counting.tokens, speed)
        if initial is not None:
            explain(told, asked, initial.manifest)
        told.trainable_parameters = trainee.trainable_parameters
    settings = limited(settings, told, fit)
    isolation.check(trainee, len(tokenizer.get_vocab()))
    fmt = format_of(base_format, settings, sentinels)
    held_out = HeldOut(
        test_part.documents, tokenizer, fmt, window=settings.context_length, max_tokens=settings.max_eval_tokens
    )
    if not held_out.tokens:
        raise EmptyDataset("the test files have no token to predict", field="dataset", hint="Mark other files as test.")
    optimizer = loop.make_optimizer(trainee, settings)
    state = checkpoint.load_state(trainee, optimizer, resume) if resume is not None else State()
    state.seconds += time.monotonic() - began
    ranks.copy_from_first(trainee.masters.values())  # drawn from the same seed, but perhaps on other hardware
    trainee.publish()
    return Loaded(
        settings=settings,
        plan=told,
        trainee=trainee,
        optimizer=optimizer,
        corpus=corpus,
        held_out=held_out,
        exam=Exam.of(train_part.documents, test_part.documents, tokenizer, fmt, settings, apart=not sharded),
        state=state,
        base_digest=base_digest,
        prompt_format=fmt.name,
        fim_sentinels=fmt.sentinels,
        put_initial=None if initial is None else lambda: checkpoint.load_adapter(trainee, initial.folder),
        ranks=ranks,
        sharded=sharded,
        probe_ids=probe.prompt(tokenizer),
    )


class _Interruptible:
    """A tokenizer that stops when the run should: a large dataset is minutes of tokenizing."""

    def __init__(self, tokenizer: Tokenizer, is_cancelled: Callable[[], bool]) -> None:
        self._tokenizer = tokenizer
        self._is_cancelled = is_cancelled

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._is_cancelled():
            raise JobCancelled("cancelled while the dataset was tokenized")
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def format_of(base_format: PromptFormat, settings: Settings, sentinels: Sequence[str] = ()) -> PromptFormat:
    """How a run renders its documents: as the base does, or with sentinels where the base cannot fill in the middle.

    Args:
        sentinels: those of the adapter that the run starts from; empty when it has none.

    Raises:
        InvalidHyperparameter: it is asked to, but the vocabulary has no tokens to spare.
    """
    if base_format.fills_in_the_middle or not settings.fim_rate:
        return base_format
    try:
        return prompts.with_sentinels(base_format, sentinels)
    except ValueError as error:
        raise InvalidHyperparameter(
            f"the model cannot be taught to fill in the middle: {error}",
            field="hyperparameters.fim_rate",
            hint="Set fim_rate to 0 or leave it out, or take a base model with fill-in-the-middle tokens.",
        ) from None


def _refuse_empty(corpus: Corpus) -> None:
    if not corpus.has_rows():
        raise EmptyDataset(
            "the train files have no token to learn from", field="dataset", hint="Add sources and scan again."
        )
