"""A tiny random-weight Llama and its tokenizer, and adapters that make themselves known by their tokens."""

from __future__ import annotations

import copy
import queue
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from services.core.models.spelling import Overhang, Spelling, token_bytes
from services.inference.adapters import lora
from services.inference.engine.engine import Engine
from services.inference.engine.graphs import Record
from services.inference.engine.runner import Runner
from services.inference.engine.sampler import Sampler
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Output, Reason, Sampling, Sequence
from services.inference.engine.speculate import Drafter
from services.inference.engine.text import TextStream


def make_tokenizer(*markers: str) -> PreTrainedTokenizerFast:
    """256 bytes and two markers, and more if wanted: every text can be spelled, characters are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(marker, special=True) for marker in ("<|endoftext|>", "<file_sep>", *markers)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model as transformers runs it, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return [int(token) for token in out[0, len(prompt) :]]


def marker(model: PreTrainedModel, seed: int, rank: int = 4) -> lora.Weights:
    """A random adapter, strong enough to change every completion."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: (torch.randn(rank, width, generator=generator) * 0.2, torch.randn(out, rank, generator=generator) * 0.2)
        for path, (out, width) in lora.adaptable(model).items()
    }
    return lora.prepare(pairs, 2.0, torch.float32, torch.device("cpu"), sha256=f"{seed}-{rank}")


def merged(model: LlamaForCausalLM, weights: lora.Weights) -> LlamaForCausalLM:
    """The model with an adapter's product added to its own weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for path, (a, b) in weights.layers.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, torch.nn.Linear)
            layer.weight += b @ a * weights.scale
    return model


class Knowing(Drafter):
    """Guesses what was chosen without guesses, with a mistake now and then."""

    def __init__(self, known: list[int], seed: int) -> None:
        super().__init__()
        self._known, self._rng = known, random.Random(seed)

    def draft(self, tokens: list[int], most: int, price: float) -> tuple[int, ...]:
        assert tokens == self._known[: len(tokens)]
        guess = self._known[len(tokens) : len(tokens) + self._rng.randrange(most + 1)]
        if guess and self._rng.random() < 0.4:
            guess[self._rng.randrange(len(guess))] = self._rng.randrange(256)
        return tuple(guess)


@dataclass
class Heard:
    """Everything a sequence delivered."""

    sequence: Sequence = field(init=False)
    inbox: queue.Queue[Output] = field(default_factory=queue.Queue)
    outputs: list[Output] = field(default_factory=list)

    def wait(self, until: Callable[[Output], bool] = lambda output: output.reason is not None) -> Heard:
        while not self.outputs or not until(self.outputs[-1]):
            self.outputs.append(self.inbox.get(timeout=10))
        return self

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def reason(self) -> Reason | None:
        return self.outputs[-1].reason

    @property
    def new(self) -> list[int]:
        return self.sequence.tokens[len(self.sequence.prompt) :]


class Bench:
    """An engine over a copy of the reference model."""

    def __init__(
        self,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        limits: Limits,
        threads: int | None = None,
        record: Record | None = None,
    ) -> None:
        self.vocabulary = token_bytes(tokenizer)
        self.model = copy.deepcopy(reference)
        self.sampler = Sampler(Spelling(self.vocabulary))
        self.runner = Runner(self.model, self.sampler, limits.blocks, threads, record)
        self.engine = Engine(self.runner, limits)

    def make(self, prompt: list[int], max_tokens: int = 16, **fields: Any) -> Heard:
        text = {key: fields.pop(key) for key in ("stop", "suffix_stop", "single_line") if key in fields}
        overhang = Overhang.of(fields.pop("overhang", ""), fields.pop("overhang_ids", ()), self.vocabulary)
        heard = Heard()
        heard.sequence = Sequence(
            prompt=prompt,
            max_tokens=max_tokens,
            text=TextStream(self.vocabulary, overhang=overhang, **text),
            deliver=heard.inbox.put,
            sampling=fields.pop("sampling", Sampling()),
            **fields,
        )
        return heard

    def submit(self, prompt: list[int], max_tokens: int = 16, **fields: Any) -> Heard:
        heard = self.make(prompt, max_tokens, **fields)
        self.engine.submit(heard.sequence)
        return heard
