"""Settings of the scanner."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from services.core.config import CoreSettings
from services.core.models.catalogue import DEFAULT_MODEL

CPU_PART_TOKENS, GPU_PART_TOKENS = 6_144, 524_288


class ScannerSettings(CoreSettings):
    """What the scanner needs besides the core's settings. Use ``services.core.config.load``."""

    scanner_model: str = DEFAULT_MODEL
    """Base model of stage 2 where a scan names none."""
    scanner_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where stage 2 runs; auto takes a GPU when there is one."""
    scanner_threads: int = Field(default=0, ge=0)
    """Threads of stage 2 on a CPU; 0 leaves it to torch (all cores)."""
    scanner_batch_tokens: int = Field(default=0, ge=0)
    """Tokens that go through the model at once; 0 means 768 on a CPU, where it keeps cancelling under a second, and
    32,768 on a GPU."""
    scanner_part_tokens: int = Field(default=0, ge=0)
    """Tokens of one part of stage 2, about: what a killed worker's successor has to measure again. 0 means 6,144 where
    there is no GPU, and 524,288 where there is one."""
    scanner_nice: int = Field(default=10, ge=0, le=19)
    """By how much the process lowers its priority, so that completions on the same cores stay fast."""
    scanner_workers: int = Field(default=1, ge=0)
    """Scans and parts of scans that this process works on at once; 0 for a replica that only answers calls."""

    @property
    def part_tokens(self) -> int:
        """Tokens of one part of stage 2."""
        if self.scanner_part_tokens:
            return self.scanner_part_tokens
        has_gpu = self.scanner_device != "cpu" and Path("/dev/nvidiactl").exists()
        return GPU_PART_TOKENS if has_gpu else CPU_PART_TOKENS
