"""llama.cpp as a peer of bench.inference, from the wheel of xllamacpp."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xllamacpp
from peft import LoraConfig, get_peft_model

from codegraft.trainer.v1.adapter_pb2 import GGUF_TYPE_BF16, GGUF_TYPE_Q8_0, GgufType
from services.core.models import weights
from services.trainer.adapters import gguf_file
from services.trainer.adapters.merge import Merged, Meter

TYPES = {"bf16": GGUF_TYPE_BF16, "Q8_0": GGUF_TYPE_Q8_0}


class LlamaCpp:
    """A server in this process over the base model, as our export writes it.

    Args:
        streams: at once, at most.
        tokens: of prompt and completion of one stream, at most.
    """

    def __init__(self, file: Path, threads: int, streams: int, tokens: int) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_parallel, parameters.n_ctx = streams, streams * tokens
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.port, parameters.warmup, parameters.verbosity = 0, False, -1
        self._server = xllamacpp.Server(parameters)

    def seconds(self, prompts: Sequence[list[int]], tokens: int) -> float:
        """Of completing all of them at once, so many tokens each."""
        threads = [threading.Thread(target=self._complete, args=(prompt, tokens)) for prompt in prompts]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    def _complete(self, prompt: list[int], tokens: int) -> None:
        asked: dict[str, Any] = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        answer = self._server.handle_completions({"prompt": prompt, **asked})
        assert answer["usage"]["completion_tokens"] == tokens, answer


@contextmanager
def files(base: Path) -> Iterator[dict[str, Path]]:
    """GGUF files of the base model by the type of their weights, until the context is left."""
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as name:
        folder = Path(name)
        nothing = get_peft_model(weights.load_model(base), LoraConfig(r=1, target_modules="all-linear"))
        nothing.save_pretrained(folder / "nothing", save_embedding_layers=False)
        yield {kind: _write(base, folder / "nothing", folder / kind, type) for kind, type in TYPES.items()}


def _write(base: Path, adapter: Path, folder: Path, type: GgufType) -> Path:
    folder.mkdir()
    gguf_file.write(Merged(base, adapter, ""), folder, "base", type, Meter())
    return folder / gguf_file.FILE
