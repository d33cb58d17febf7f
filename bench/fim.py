"""Does fill-in-the-middle pay on a base model that was never taught it?

Trains small adapters of the default model on minio-py's source, a few files held out: one on plain documents, one with
a spare special token before suffix and prefix (services/core/models/prompts), and one in the usual order of prefix,
suffix and middle with three such tokens. Then completes held-out places through the serving engine and compares.

    python -m bench.fim [--steps 40] [--places 80] [--kind KIND] [--folder DIR] [train | compare]

With a folder an interrupted call goes on where it stopped, and the comparison can be made anew.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from typing import Any

import minio
import torch
from safetensors.torch import load_file

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.core.models import catalogue, prompts, weights
from services.core.models.prompts import PromptFormat
from services.core.models.spelling import Overhang
from services.inference import model as serving
from services.inference.adapters.lora import Weights
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Output
from services.inference.engine.sequence import Sequence as Stream
from services.inference.engine.text import TextStream, suffix_stop
from services.trainer import checkpoint, loop
from services.trainer.corpus import syntax
from services.trainer.corpus.data import Corpus, Document
from services.trainer.model.lora import WEIGHTS, Trainee
from services.trainer.planning.plan import Facts, plan
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut
from services.trainer.state import State
from services.trainer.story import Evaluated, StepDone

WINDOW = 256
"""Tokens of a row, and of a prompt at most."""
HELD_OUT = 5
"""Every fifth file."""
KINDS = ("plain", "sentinels", "sentinels, usual order")


@dataclass(frozen=True)
class Place:
    """A cursor in a held-out file, and what stood there: the rest of the line, or an expression within it."""

    kind: str
    path: str
    prefix: str
    middle: str
    suffix: str


def format_of(kind: str, base: PromptFormat) -> PromptFormat:
    """What an adapter of that kind is trained and served with."""
    if kind == "plain":
        return base
    taught = prompts.with_sentinels(base)
    if kind == "sentinels":
        return taught
    prefix, suffix, middle = (id for _, id in base.spare[-3:])
    stops = tuple({*taught.stop_ids, middle})
    return replace(taught, style="psm", prefix_id=prefix, suffix_id=suffix, middle_id=middle, stop_ids=stops)


def source() -> tuple[list[Document], list[Document]]:
    """minio-py's files: to train on, and held out."""
    root = Path(minio.__file__).parent
    files = [p for p in sorted(root.rglob("*.py")) if p.stat().st_size > 2000]
    documents = [Document(f"minio/{p.relative_to(root)}", "minio", p.read_text(), "Python") for p in files]
    return [d for n, d in enumerate(documents) if n % HELD_OUT], documents[::HELD_OUT]


def places(documents: Sequence[Document], count: int) -> list[Place]:
    """Half of them ends of lines, half expressions with text behind them on their line; 8 characters at least."""
    rng, found = random.Random(7), list[Place]()
    while len(found) < count:
        document = rng.choice(documents)
        text, at = document.text, rng.randrange(len(document.text))
        kind = ("rest of a line", "within a line")[len(found) % 2]
        if kind == "rest of a line":
            first, second = at, text.find("\n", at)
            if not text[text.rfind("\n", 0, at) + 1 : at].strip():
                continue  # a whole line can be anything
        else:
            tree = syntax.parse(document.language, text)
            nodes = tree.nodes_at(at, 0, len(text)) if tree else []
            nodes = [n for n in nodes if "\n" not in text[slice(*n)] and text[n[1] : n[1] + 1] not in ("", "\n")]
            if not nodes:
                continue
            first, second = rng.choice(nodes)
        if second - first >= 8 and text[first:second].strip():
            found.append(Place(kind, document.path, text[:first], text[first:second], text[second:]))
    return found


def settings_of(kind: str, steps: int) -> Settings:
    """As AUTO plans them, but for the length and the share of middles."""
    spec = catalogue.find("")
    facts = Facts(90_000, 20_000, 1.4, spec.parameters, spec.context_length, spec.lora_targets, False, 400.0, False)
    asked = Hyperparameters(
        train_steps=steps, eval_steps=steps, batch_size=4, context_length=WINDOW, max_eval_tokens=8192, seed=1
    )
    return replace(plan(asked, facts)[0], fim_rate=0.0 if kind == "plain" else 0.5)


def train(kind: str, steps: int, folder: Path) -> None:
    """Trains one adapter, or goes on with it; its state is kept every few steps."""
    kept = folder / kind.replace(" ", "-").replace(",", "")
    if (kept / WEIGHTS).exists():
        return
    settings, base = settings_of(kind, steps), weights.ensure_weights(catalogue.find(""), cache())
    tokenizer = weights.load_tokenizer(base)
    fmt = format_of(kind, prompts.detect(tokenizer))
    learned, held_out = source()
    corpus = Corpus(
        learned, tokenizer, fmt, window=settings.context_length, fim_rate=settings.fim_rate, seed=settings.seed
    )
    began = time.monotonic()
    counts = corpus.counts()
    print(f"{kind}: {counts}; a pass of {counts.rows} rows is drawn in {time.monotonic() - began:.2f} s", flush=True)
    trainee = Trainee(base, settings, device=torch.device("cpu"))
    optimizer = loop.make_optimizer(trainee, settings)
    # The base is measured once, by the first kind.
    fresh = State() if kind == "plain" else State(base_loss=float("inf"), best_loss=float("inf"))
    state = checkpoint.load_state(trainee, optimizer, kept) if kept.exists() else fresh
    test = HeldOut(held_out, tokenizer, fmt, window=WINDOW, max_tokens=settings.max_eval_tokens)
    for event in loop.train(trainee, optimizer, settings, corpus, test, state, lambda: False):
        match event:
            case Evaluated():
                print(f"{kind}: step {event.step}, plain held-out loss {event.test.loss:.4f}", flush=True)
            case StepDone():
                if event.step % 2 == 0:
                    checkpoint.save_state(trainee, optimizer, state, kept)
                    told = f"train loss {event.train_loss:.3f}, {event.tokens / event.seconds:.0f} tokens/s"
                    print(f"{kind}: step {event.step}, {told}", flush=True)
    checkpoint.save_adapter(trainee, kept, "")


def compare(kinds: Sequence[str], count: int, folder: Path) -> None:
    """Completes the same places with the base and with every adapter there is."""
    base = weights.ensure_weights(catalogue.find(""), cache())
    tokenizer = weights.load_tokenizer(base)
    loaded = serving.start(weights.load_model(base), tokenizer, "", "", Limits(waiting=1000, project_waiting=1000))
    found = places(source()[1], count)
    for kind in kinds:
        kept = folder / kind.replace(" ", "-").replace(",", "")
        if kind != "base" and not (kept / WEIGHTS).exists():
            continue
        fmt = format_of(kind.replace("base", "plain"), loaded.format)
        adapter = None if kind == "base" else _adapter(loaded, kept)
        for stops in (True, False) if fmt.fills_in_the_middle else (True,):
            began = time.monotonic()
            texts = _complete(loaded, fmt, adapter, found, stops)
            told = f"{kind}{', stopped at the suffix' * stops}: "
            for place_kind in sorted({place.kind for place in found}):
                pairs = [(p.middle, t) for p, t in zip(found, texts, strict=True) if p.kind == place_kind]
                exact = sum(wanted.rstrip() == text.rstrip() for wanted, text in pairs) / len(pairs)
                similar = sum(difflib.SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs)
                told += f"{place_kind}: exact {exact:.1%}, edit similarity {similar / len(pairs):.3f}; "
            print(f"{told}{len(found)} places in {time.monotonic() - began:.0f} s", flush=True)
    loaded.engine.stop()


def _adapter(loaded: serving.LoadedModel, kept: Path) -> Weights:
    tensors, pairs = load_file(kept / WEIGHTS), dict[str, Any]()
    for path in loaded.base.layers:
        a = tensors.get(f"base_model.model.{path}.lora_A.weight")
        if a is not None:
            pairs[path] = (a, tensors[f"base_model.model.{path}.lora_B.weight"])
    return loaded.prepare(pairs, 2.0, hashlib.sha256((kept / WEIGHTS).read_bytes()).hexdigest())


def _complete(
    loaded: serving.LoadedModel, fmt: PromptFormat, adapter: Weights | None, found: Sequence[Place], stops: bool
) -> list[str]:
    inboxes: list[Queue[Output]] = []
    for place in found:
        prompt = prompts.completion_prompt(
            fmt, loaded.tokenizer, path=place.path, prefix=place.prefix, suffix=place.suffix, budget=WINDOW
        )
        stream = TextStream(
            loaded.vocabulary,
            suffix_stop=suffix_stop(place.suffix) if stops else (),
            single_line=True,
            overhang=Overhang.of(prompt.overhang, prompt.overhang_ids, loaded.vocabulary),
        )
        inboxes.append(Queue())
        ends = frozenset(fmt.stop_ids)
        loaded.engine.submit(Stream(prompt.ids, 32, stream, inboxes[-1].put, adapter=adapter, stop_ids=ends))
    return ["".join(_outputs(inbox)) for inbox in inboxes]


def _outputs(inbox: Queue[Output]) -> list[str]:
    texts, reason = [], None
    while reason is None:
        output = inbox.get(timeout=300)
        texts.append(output.text)
        reason = output.reason
    return texts


def cache() -> Path:
    """Where the model's weights lie."""
    return Path.home() / ".cache" / "codegraft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "train", "compare"], default="all")
    parser.add_argument("--kind", choices=("base", *KINDS), action="append")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--places", type=int, default=80)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="codegraft-fim-"))
    for kind in asked.kind or KINDS:
        if asked.what != "compare" and kind != "base":
            train(kind, asked.steps, folder)
    if asked.what != "train":
        compare(asked.kind or ("base", *KINDS), asked.places, folder)


if __name__ == "__main__":
    main()
