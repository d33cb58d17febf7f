"""Runs stage 2 in a thread: the model on its device, a way to stop.

torch is imported in the thread, so that the service answers before it is loaded. It is always the same thread: OpenMP
keeps a team for each one that has ever computed, and waits passively once all of them together are more than the cores.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from services.core import garbage
from services.core.errors import JobCancelled
from services.core.models import weights
from services.scanner.config import ScannerSettings
from services.scanner.loss import FileLoss, LossMeter
from services.scanner.rules import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CPU_BATCH_TOKENS = 768
GPU_BATCH_TOKENS = 32768


class Meter:
    """Keeps the model of the last scan, because the next one mostly wants the same."""

    def __init__(self, settings: ScannerSettings) -> None:
        self._settings = settings
        self._loaded: tuple[Path, PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="losses")  # one forward pass uses all cores

    async def measure(
        self, folder: Path, rules: Rules, files: Sequence[tuple[str, str]], stop: threading.Event
    ) -> list[tuple[str, FileLoss]]:
        """The losses of some files.

        Args:
            folder: of the model.
            files: keys and texts.
            stop: ends it before its next batch.

        Raises:
            JobCancelled: it was stopped.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, folder, rules, files, stop)

    def _run(
        self, folder: Path, rules: Rules, files: Sequence[tuple[str, str]], stop: threading.Event
    ) -> list[tuple[str, FileLoss]]:
        if stop.is_set():
            raise JobCancelled("the scan was cancelled")
        model, tokenizer = self._load(folder)
        meter = LossMeter(
            model,
            tokenizer,
            window_tokens=rules.window_tokens,
            max_tokens=rules.max_tokens_per_file,
            batch_tokens=self._settings.scanner_batch_tokens
            or (CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS),
        )
        return list(meter.measure(files, stop=stop.is_set))

    def _load(self, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        with garbage.unsearched():
            import torch

            from services.scanner import attention

        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None  # the old one goes before the new one comes
            if self._settings.scanner_threads:
                torch.set_num_threads(self._settings.scanner_threads)
            device = self._settings.scanner_device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            model = weights.load_model(folder, device=device)
            attention.use(model)
            self._loaded = (folder, model, weights.load_tokenizer(folder))
        return self._loaded[1], self._loaded[2]
