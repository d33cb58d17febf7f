"""The only owner of tensors: the model, the blocks of keys and values, the sampler's state.

A step is one forward pass over the tokens of all its sequences, prompts and decodes side by side without padding. Used
from the engine's thread only.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from services.inference.adapters.lora import Segment, Weights, install
from services.inference.engine import kernels
from services.inference.engine.attention import NAME, Step
from services.inference.engine.block import simplify
from services.inference.engine.blocks import BLOCK, blocks_for
from services.inference.engine.compiled import Compiled, fits
from services.inference.engine.cores import reserve
from services.inference.engine.few import MOST, bits, few
from services.inference.engine.graphs import CudaGraphs, Graphs, Record
from services.inference.engine.layout import Layout, lay_out
from services.inference.engine.pace import Pace
from services.inference.engine.rows import Row, batches
from services.inference.engine.sampler import Sampler
from services.inference.engine.scheduler import Work
from services.inference.engine.sequence import Result, Sequence


class Runner:
    """Computes steps.

    Args:
        model: a causal LM in eval mode; its linear layers are made to take adapters.
        sampler: chooses the tokens.
        blocks: of the KV cache; on a CPU memory is taken when one is first used.
        threads: most of a step's arithmetic, see engine/pace.py; None leaves them as they are.
        record: makes recordings of steps, see engine/graphs.py; None is CUDA's on a GPU, and nothing elsewhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampler: Sampler,
        blocks: int,
        threads: int | None = None,
        record: Record | None = None,
    ) -> None:
        config = model.config
        self._model, self._sampler, self._threads = model, sampler, threads
        self._pace = Pace(threads) if threads is not None and threads > 1 and model.device.type == "cpu" else None
        self._active = install(model)
        simplify(model)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        # One block more than is given out: what fills up a recorded step writes to it.
        shape = (config.num_hidden_layers, 2, kv_heads, (blocks + 1) * BLOCK, head_dim)
        memory = torch.empty(shape, dtype=model.dtype, device=model.device)
        self._kv = list(memory.unbind())
        self._bits = bits(self._kv)
        self._compiled: Compiled | None = None
        if record is None and model.device.type == "cuda":
            record = CudaGraphs()
        self._graphs = Graphs(model, self._active, memory, record) if record is not None else None
        model.set_attn_implementation(NAME)

    def shared(self) -> AbstractContextManager[Any]:
        """Held by who needs the processor beside the steps, and not the device: a GPU's steps go on as ever."""
        return nullcontext() if self._pace is None else self._pace.beside()

    @property
    def beside(self) -> AbstractContextManager[Any]:
        """Held by who uses the device beside the steps."""
        return self.shared() if self._graphs is None else self._graphs.beside

    def begin(self) -> None:
        """Called once in the thread that will call :meth:`step`, before it does."""
        if self._threads is not None:
            reserve(self._threads)
        if self._model.device.type == "cpu":
            kernels.warm()
            kernels.use(self._threads)
            self._compiled = Compiled(self._model, self._active) if fits(self._model) else None
        if self._graphs is not None:
            self._graphs.warm()

    @torch.inference_mode()
    def step(self, work: list[Work]) -> list[Result | None]:
        """Computes the work's tokens; for each entry what it was wanted for, None while its prompt is not through."""
        # One version's sequences stand side by side, so that its adapter is one product over all of them.
        order = sorted(range(len(work)), key=lambda index: self._active.order(work[index].sequence.adapter))
        layout = lay_out(work[index] for index in order)
        logits = self._graphs.logits(layout) if self._graphs is not None else None
        if logits is None:
            logits = self._logits(layout) if self._pace is None else self._paced(self._pace, layout)
        outputs = torch.split_with_sizes(logits, [work[index].outputs for index in order])
        return self._results(work, dict(zip(order, outputs, strict=True)))

    def _paced(self, pace: Pace, layout: Layout) -> torch.Tensor:
        """As :meth:`_logits`, with as many threads as are quickest."""
        tokens = len(layout.ids)
        threads = pace.threads(tokens)
        self._take(threads)
        began = time.perf_counter()
        logits = self._logits(layout)
        if self._threads == threads:
            pace.took(threads, tokens, time.perf_counter() - began)
        return logits

    def _take(self, threads: int) -> None:
        """Takes so many threads from here on."""
        if threads != self._threads:
            self._threads = threads
            reserve(threads)
            kernels.use(threads)

    def _leave(self) -> None:
        """Leaves half of the cores in the middle of a step, once others need them."""
        if self._pace is not None and (threads := self._pace.crowded()):
            self._take(threads)

    def _logits(self, layout: Layout) -> torch.Tensor:
        """Of the tokens whose outputs are wanted, ``[last, embeddings]``."""
        device, tokens = self._model.device, len(layout.ids)
        together, alone = batches(layout.rows, device)
        step = Step(
            batches=together,
            rows=alone,
            slots=torch.tensor(layout.slots, device=device),
            begun=torch.tensor(layout.begun, device=device) if layout.begun else None,
            kv=self._kv,
            between=None if self._pace is None else self._leave,
        )
        if self._bits is not None and tokens <= MOST:
            step = replace(step, few=few(step, self._bits, layout.rows))
        with self._active.use(layout.segments):
            if self._compiled is not None and step.few is not None:
                return self._compiled.logits(layout.ids, layout.positions, layout.last, step)
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([layout.ids], device=device),
                position_ids=torch.tensor([layout.positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(layout.last, dtype=torch.long, device=device),
                step=step,
            ).logits
        return logits[0]

    def _results(self, work: list[Work], outputs: dict[int, torch.Tensor]) -> list[Result | None]:
        """From each entry's outputs ``[outputs, embeddings]``, by its index."""
        results: list[Result | None] = [None] * len(work)
        sampling = [index for index, item in enumerate(work) if item.samples]
        if sampling:
            rows = [outputs[index] for index in sampling]
            logits = rows[0] if len(rows) == 1 else torch.cat(rows)
            chosen = self._sampler.sample(logits, [(work[index].sequence, work[index].drafts) for index in sampling])
            for index, tokens in zip(sampling, chosen, strict=True):
                top = work[index].sequence.sampling.logprobs
                used = outputs[index][: len(tokens)]
                results[index] = Result(tokens, () if top is None else self._sampler.logprobs(used, tokens, top))
        for index, item in enumerate(work):
            sequence, end = item.sequence, item.start + item.count
            if sequence.targets and item.outputs:
                at = end - sequence.reusable
                targets = sequence.targets[at - item.outputs : at]
                results[index] = Result((), self._sampler.logprobs(outputs[index], targets, 0))
        return results

    @torch.inference_mode()
    def probe(self, weights: Weights, ids: list[int]) -> torch.Tensor:
        """The logits of a prompt on an adapter, ``[tokens, embeddings]``: of no sequence, and from any thread."""
        device, count = self._model.device, len(ids)
        row = Row(0, count, 0, list(range(blocks_for(count))))
        # Memory of its own, so that the engine's is not touched.
        kv = [torch.zeros_like(layer[:, :, : len(row.blocks) * BLOCK]) for layer in self._kv]
        step = Step(batches=[], rows=[row], slots=torch.tensor(row.written(), device=device), begun=None, kv=kv)
        kernels.use(1)  # a team of this thread's, too, would be too many, see engine/cores.py
        with self.beside, self._active.beside(Segment(0, count, weights)):
            if self._compiled is not None and count <= MOST and (own := bits(kv)) is not None:
                step = replace(step, few=few(step, own, [row]))
                compiled = Compiled(self._model, self._active)  # with memory of its own for what is in between
                return compiled.logits(ids, list(range(count)), list(range(count)), step)
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.arange(count, device=device)[None],
                use_cache=False,
                step=step,
            ).logits
        return logits[0]

    def stage(self, weights: Weights) -> None:
        """Copies an adapter to where steps find it that mix several; from any thread, beside the steps."""
        with self.beside:
            self._active.stage(weights)

    def release(self, sequence: Sequence) -> None:
        """Frees what is kept for a sequence beside its blocks; nothing is fine."""
        self._sampler.forget(sequence)
