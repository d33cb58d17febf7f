"""Adapters with a prompt format of their own: trained, verified, and served beside the base and other adapters."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from codegraft.inference.v1.serving_pb2 import Serving
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core import errors
from services.core.models import prompts
from services.core.models.prompts import PromptFormat
from services.core.runtime import Runtime
from services.core.state import Table
from services.inference import model as inference_model
from services.inference.adapters import verify
from services.inference.adapters.disk import DiskCache
from services.inference.adapters.follower import Follower
from services.inference.adapters.host import HostCache
from services.inference.adapters.loader import Loader
from services.inference.adapters.manifests import Manifests
from services.inference.adapters.registry import Registry
from services.inference.completions import Completions, Delta, Request, Started, Stop
from services.inference.engine.scheduler import Limits
from services.inference.model import LoadedModel
from services.inference.prompter import Code, Prompter
from services.trainer import checkpoint, loop
from services.trainer.corpus.data import Corpus, Document
from services.trainer.model.lora import Trainee
from tests.unit.inference import tiny
from tests.unit.trainer.conftest import SMALL, Settings

PROJECT = "projects/demo"
NAME = f"{PROJECT}/runs/one/checkpoints/{{}}"
DIGEST = "d" * 64
CODE = Code(path="a.py", prefix="def add(left, right):\n    return le", suffix="\n\nadd(1, 2)\n")


class Peers:
    """Ingest and the trainer, as far as they are asked."""

    async def exists(self, project: str) -> bool:
        return True

    async def best(self, project: str, base_model: str) -> None:
        return None


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.make_tokenizer("<one>", "<two>", "<three>")


@pytest.fixture(scope="module")
def reference(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny.make_model(tokenizer)


@pytest.fixture
def loaded(reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[LoadedModel]:
    reference.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    made = inference_model.start(model, tokenizer, "tiny", DIGEST, Limits(running=4, kv_tokens=8192), max_rank=8)
    yield made
    made.engine.stop()


class Server:
    """Completions over real parts, in memory."""

    def __init__(self, loaded: LoadedModel, folder: Path) -> None:
        self.runtime, self.registry, self.loaded = Runtime.memory(), Registry(), loaded
        manifests = Manifests(self.runtime.artifacts, folder / "manifests")
        disk = DiskCache(folder / "adapters", self.runtime.blobs, 10**8)
        self.loader = Loader(manifests, disk, HostCache(10**8), self.registry)
        future: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()
        future.set_result(loaded)
        follower = Follower(
            table=Table(self.runtime.state("inference"), Serving, missing=errors.ServingNotFound),
            events=self.runtime.events,
            manifests=manifests,
            loader=self.loader,
            registry=self.registry,
            bests=Peers(),
            replica="r1",
            reconcile=60,
        )
        self.completions = Completions(
            model=future,
            registry=self.registry,
            follower=follower,
            loader=self.loader,
            projects=Peers(),
            prompter=Prompter(300),
            load_wait=1.0,
            tokens=self.runtime.quotas.tokens,
        )

    async def store(self, step: int, folder: Path, fmt: PromptFormat, **changed: Any) -> str:
        """Commits the adapter of a folder as the trainer's worker does."""
        data = (folder / verify.WEIGHTS).read_bytes()
        fields: dict[str, Any] = {
            "prompt_format": fmt.name,
            "fim_sentinels": fmt.sentinels,
            "sha256": hashlib.sha256(data).hexdigest(),
            "lora_r": json.loads((folder / verify.CONFIG).read_text())["r"],
            **changed,
        }
        manifest = AdapterManifest(name=NAME.format(step), base_model="tiny", base_digest=DIGEST, **fields)
        files = {verify.WEIGHTS: data, verify.CONFIG: (folder / verify.CONFIG).read_bytes()}
        await self.runtime.artifacts.commit(manifest.name, manifest, files)
        return manifest.name

    async def complete(self, code: Code = CODE, **fields: Any) -> tuple[Started, str]:
        request = Request(PROJECT, code, stop=Stop(max_tokens=12), **fields)
        parts = [part async for part in self.completions.run(request)]
        assert isinstance(parts[0], Started)
        return parts[0], "".join(part.text for part in parts if isinstance(part, Delta))


@pytest.fixture
async def server(loaded: LoadedModel, tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(loaded, tmp_path / "adapters")
    yield made
    assert made.registry.streams(PROJECT) == {}, "a stream still holds its version"


def train(base: Path, tokenizer: PreTrainedTokenizerFast, fmt: PromptFormat, seed: int, folder: Path) -> Path:
    """A few steps; the adapter's folder."""
    texts = [f"def add_{n}(left, right):\n    return left + right + {n}\n" for n in range(6)]
    documents = [Document(f"f{n}.py", "s", text * 3, "Python") for n, text in enumerate(texts)]
    settings = Settings(**{**SMALL, "fim_rate": 0.5, "learning_rate": 0.05, "seed": seed})
    corpus = Corpus(documents, tokenizer, fmt, window=64, fim_rate=0.5, seed=seed)
    assert bool(corpus.counts().fim_pieces) == fmt.fills_in_the_middle
    trainee = Trainee(base, settings, device=torch.device("cpu"), dtype=torch.float32)
    optimizer = loop.make_optimizer(trainee, settings)
    for step in range(3):
        rows = corpus.batch(step, 4)
        trainee.accumulate(rows, sum(len(row.ids) for row in rows))
        trainee.take_gradients()
        optimizer.step()
        trainee.publish()
    checkpoint.save_adapter(trainee, folder, "tiny")
    return folder


async def test_each_version_gets_prompts_of_the_format_it_was_trained_with(
    server: Server, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = prompts.detect(tokenizer)
    taught = prompts.with_sentinels(plain)
    other = prompts.with_sentinels(plain, ["<one>", "<two>"])
    stored = [
        await server.store(n, train(tmp_path / "base", tokenizer, fmt, n, tmp_path / f"adapter-{n}"), fmt)
        for n, fmt in enumerate((plain, taught, other))
    ]
    asked = [{"base": True}, *({"checkpoint": name} for name in stored), {"base": True}]
    answers = await asyncio.gather(*(server.complete(**fields) for fields in asked))
    for (started, text), fmt in zip(answers, (plain, plain, taught, other, plain), strict=True):
        expected = prompts.completion_prompt(
            fmt, tokenizer, path=CODE.path, prefix=CODE.prefix, suffix=CODE.suffix, budget=240
        )
        assert started.prompt == expected
        assert started.prompt.suffix_used == (fmt is not plain)
        version = server.registry.find(started.adapter_sha256) if started.adapter_sha256 else None
        trained = prompts.training_fim(
            fmt, tokenizer, path=CODE.path, prefix=CODE.prefix, middle="ft", suffix=CODE.suffix
        )
        assert trained[: len(expected.ids)] == expected.ids, "serving order is training order"
        assert version is None or version.format == fmt
        assert text, "and it answers"
    texts = {text for _, text in answers}
    assert answers[0][1] == answers[-1][1] and len(texts) == 4, "every version computes with its own weights and prompt"


async def test_without_a_suffix_the_format_of_the_version_heals_as_a_plain_one(
    server: Server, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    taught = prompts.with_sentinels(prompts.detect(tokenizer))
    name = await server.store(1, train(tmp_path / "base", tokenizer, taught, 1, tmp_path / "adapter"), taught)
    code = Code(path=CODE.path, prefix=CODE.prefix, suffix="")
    by_adapter, by_base = await server.complete(code, checkpoint=name), await server.complete(code, base=True)
    assert by_adapter[0].prompt == by_base[0].prompt and by_base[0].prompt.overhang == " le"


async def test_what_was_taught_sentinels_is_also_stopped_at_the_suffix(
    server: Server, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = prompts.with_sentinels(prompts.detect(tokenizer))
    name = await server.store(1, train(tmp_path / "base", tokenizer, taught, 1, tmp_path / "adapter"), taught)
    submitted: list[Any] = []
    submit = server.loaded.engine.submit
    monkeypatch.setattr(server.loaded.engine, "submit", lambda sequence: (submitted.append(sequence), submit(sequence)))
    started, _ = await server.complete(checkpoint=name)
    assert started.prompt.suffix_used and submitted[0].text._stop == ["\nadd(1, 2)\n"]


@pytest.mark.parametrize(
    "changed",
    [
        {"fim_sentinels": []},
        {"fim_sentinels": ["<one>"]},
        {"fim_sentinels": ["<one>", "<one>"]},
        {"fim_sentinels": ["<one>", "<file_sep>"]},
        {"fim_sentinels": ["<one>", "<|endoftext|>"]},
        {"fim_sentinels": ["<one>", "<four>"]},
        {"fim_sentinels": ["<one>", "a"]},
        {"prompt_format": "qwen", "fim_sentinels": []},
    ],
)
async def test_a_format_that_the_vocabulary_does_not_have_is_refused(
    server: Server, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, changed: dict[str, Any]
) -> None:
    taught = prompts.with_sentinels(prompts.detect(tokenizer))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / verify.WEIGHTS).write_bytes(b"never read")
    (tmp_path / "a" / verify.CONFIG).write_text('{"r": 4}')
    name = await server.store(1, tmp_path / "a", taught, **changed)
    with pytest.raises(errors.AdapterRejected):
        await server.complete(checkpoint=name)


async def test_a_prompt_that_is_refused_holds_no_version(
    server: Server, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    taught = prompts.with_sentinels(prompts.detect(tokenizer))
    name = await server.store(1, train(tmp_path / "base", tokenizer, taught, 1, tmp_path / "adapter"), taught)
    with pytest.raises(errors.PromptTooLong):
        await server.complete(Code(path="long/" * 100, prefix="x", suffix="y"), checkpoint=name)
    assert server.registry.streams(PROJECT) == {}
