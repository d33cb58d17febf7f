"""Runs stage 2 in a thread: the model on its device, results as they come, a way to stop.

torch is imported in the thread, so that the service answers before it is loaded.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from services.core.errors import JobCancelled
from services.core.models import weights
from services.scanner import loss
from services.scanner.config import ScannerSettings
from services.scanner.loss import FileLoss, LossMeter
from services.scanner.rules import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLL_SECONDS = 0.25
CPU_BATCH_TOKENS = 768
GPU_BATCH_TOKENS = 32768


@dataclass(frozen=True, slots=True)
class Work:
    """One text to measure."""

    sha256: str
    characters: int


@dataclass(slots=True)
class Step:
    """What has come since the step before."""

    losses: dict[str, FileLoss]
    done_tokens: int
    """Tokens read so far."""
    total_tokens: float
    """Tokens in all: those read, and an estimate of the rest that follows the files measured so far."""
    done_files: int


@dataclass(slots=True)
class _Shared:
    """What the thread tells. Each field is written by the thread alone."""

    results: deque[tuple[str, FileLoss]] = field(default_factory=deque)
    tokens: int = 0
    finished_tokens: int = 0
    """Tokens read when the last file was finished."""


class Meter:
    """Keeps the model of the last scan, because the next one mostly wants the same."""

    def __init__(self, settings: ScannerSettings) -> None:
        self._settings = settings
        self._loaded: tuple[Path, PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._lock = threading.Lock()

    async def measure(
        self, folder: Path, rules: Rules, work: Sequence[Work], text_of: Callable[[str], str]
    ) -> AsyncGenerator[Step, None]:
        """Measures the texts and yields several times a second, the last time with everything done.

        Leaving the loop stops the thread before its next batch.
        """
        shared = _Shared()
        stop = threading.Event()
        thread = asyncio.ensure_future(
            asyncio.to_thread(self._run, folder, rules, [item.sha256 for item in work], text_of, shared, stop)
        )
        estimates = {item.sha256: loss.estimate(item.characters, rules.max_tokens_per_file) for item in work}
        remaining, finished, files = sum(estimates.values()), 0.0, 0
        try:
            while True:
                done, _ = await asyncio.wait({thread}, timeout=POLL_SECONDS)
                new: dict[str, FileLoss] = {}
                while shared.results:
                    sha256, measured = shared.results.popleft()
                    new[sha256] = measured
                    finished += estimates[sha256]
                files += len(new)
                ratio = shared.finished_tokens / finished if finished else 1.0
                total = max(shared.tokens, shared.finished_tokens + (remaining - finished) * ratio)
                yield Step(new, shared.tokens, total, files)
                if done:
                    thread.result()
                    return
        finally:
            stop.set()
            # It stops before its next batch or text. Not waited for to the end: importing torch takes seconds.
            await asyncio.wait({thread}, timeout=POLL_SECONDS)
            thread.add_done_callback(_take_note)

    def _run(
        self,
        folder: Path,
        rules: Rules,
        order: list[str],
        text_of: Callable[[str], str],
        shared: _Shared,
        stop: threading.Event,
    ) -> None:
        with self._lock:  # one forward pass uses all cores
            model, tokenizer = self._load(folder)
            meter = LossMeter(
                model,
                tokenizer,
                window_tokens=rules.window_tokens,
                max_tokens=rules.max_tokens_per_file,
                batch_tokens=self._settings.scanner_batch_tokens
                or (CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS),
            )

            def on_batch(tokens: int) -> None:
                shared.tokens += tokens

            def texts() -> Iterator[tuple[str, str]]:
                for sha256 in order:
                    if stop.is_set():
                        raise JobCancelled("the scan was cancelled")
                    yield sha256, text_of(sha256)

            for sha256, measured in meter.measure(texts(), stop=stop.is_set, on_batch=on_batch):
                shared.finished_tokens = shared.tokens
                shared.results.append((sha256, measured))

    def _load(self, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        import torch

        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None  # the old one goes before the new one comes
            if self._settings.scanner_threads:
                torch.set_num_threads(self._settings.scanner_threads)
            device = self._settings.scanner_device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            model = weights.load_model(folder)
            model.to(torch.device(device))  # type: ignore[arg-type]  # a decorator hides its signature
            self._loaded = (folder, model, weights.load_tokenizer(folder))
        return self._loaded[1], self._loaded[2]


def _take_note(thread: asyncio.Future[None]) -> None:
    """An exception of a thread that nobody waits for any more is no news."""
    if not thread.cancelled():
        thread.exception()
