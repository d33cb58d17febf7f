"""llama.cpp as a peer of bench.inference, from the wheel of xllamacpp, in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import xllamacpp
from peft import LoraConfig, get_peft_model

from codegraft.trainer.v1.adapter_pb2 import GGUF_TYPE_BF16, GGUF_TYPE_Q8_0
from services.core.models import weights
from services.trainer.adapters import gguf_file
from services.trainer.adapters.merge import Merged, Meter

TYPES = {"llama.cpp, bf16": GGUF_TYPE_BF16, "llama.cpp, Q8_0": GGUF_TYPE_Q8_0}

_server: Any = None
"""The other process's."""


class LlamaCpp:
    """A server over one file; so many streams at once, and so many tokens of prompt and completion each."""

    def __init__(self, file: Path, threads: int, streams: int, tokens: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, spawn, _load, (file, threads, streams, tokens))

    def seconds(self, prompts: Sequence[list[int]], tokens: int) -> float:
        """Of completing all of them at once, so many tokens each."""
        return self.pool.submit(_complete_all, prompts, tokens).result()


@contextmanager
def servers(base: Path, threads: int, streams: int, tokens: int) -> Iterator[dict[str, LlamaCpp]]:
    """Servers over the base model as our export writes it, by the type of its weights."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="codegraft-bench-")))
        nothing = get_peft_model(weights.load_model(base), LoraConfig(r=1, target_modules="all-linear"))
        nothing.save_pretrained(str(folder / "nothing"), save_embedding_layers=False)
        found = {}
        for name, type in TYPES.items():
            (folder / name).mkdir()
            gguf_file.write(Merged(base, folder / "nothing", ""), folder / name, "base", type, Meter())
            found[name] = LlamaCpp(folder / name / gguf_file.FILE, threads, streams, tokens)
            stack.enter_context(found[name].pool)
        yield found


def _load(file: Path, threads: int, streams: int, tokens: int) -> None:
    global _server
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_parallel, parameters.n_ctx = streams, streams * tokens
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.port, parameters.warmup, parameters.verbosity = 0, False, -1
    _server = xllamacpp.Server(parameters)


def _complete_all(prompts: Sequence[list[int]], tokens: int) -> float:
    callers = [threading.Thread(target=_complete, args=(prompt, tokens)) for prompt in prompts]
    began = time.perf_counter()
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return time.perf_counter() - began


def _complete(prompt: list[int], tokens: int) -> None:
    asked = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    answer = _server.handle_completions({"prompt": prompt, **asked})
    assert answer["usage"]["completion_tokens"] == tokens, answer
