"""Settings of the inference service."""

from __future__ import annotations

import os
import socket
from typing import Literal

from pydantic import Field

from services.core.config import CoreSettings
from services.core.models.catalogue import DEFAULT_MODEL


class InferenceSettings(CoreSettings):
    """What the inference service needs beyond the core's settings."""

    inference_model: str = DEFAULT_MODEL
    """Base model: catalogue id, "hf:<organisation>/<name>", "store:<name>" or "dir:<absolute path>"."""
    inference_threads: int = Field(default=0, ge=0)
    """Most threads of a step's arithmetic; 0 means one a core. While others compute on the same cores, half of them."""
    inference_weights: Literal["auto", "bf16", "int8"] = "auto"
    """How a CPU reads the base model's weights: all 16 bits ("bf16"), or 8 of them in steps of a few tokens ("int8":
    one stream is two thirds faster for half a per cent of the loss); "auto" is "bf16". A GPU takes the weights as they
    are."""
    inference_max_running: int = Field(default=16, ge=1, le=256)
    """Most completions in one step."""
    inference_max_waiting: int = Field(default=64, ge=1)
    """Most completions in the queue; more get QUEUE_FULL. Several of one prompt wait, or are refused, together."""
    inference_project_running: int = Field(default=0, ge=0)
    """Most completions of one project in one step; 0 for all places. While others wait, it has its share at most."""
    inference_project_waiting: int = Field(default=48, ge=1)
    """Most completions of one project in the queue; more get QUEUE_FULL, so that others find room in it."""
    inference_step_tokens: int = Field(default=256, ge=16)
    """Most tokens in one step: smaller keeps running streams smooth, larger gets prompts through sooner. A GPU
    wants 2048 or so."""
    inference_speculation_tokens: int = Field(default=7, ge=0, le=15)
    """Most tokens of a completion that are guessed from its own text and checked in one step: sooner where code repeats
    itself. Few are guessed where guesses are wrong or many completions run; 0 for none. In float32 the text is the same
    with guesses and without. In bf16 and int8 the number of tokens in a step decides which kernel computes a product,
    so that of two nearly equal tokens the other one may come."""
    inference_kv_tokens: int = Field(default=32768, ge=8192)
    """Most tokens whose keys and values are kept, those of ended completions too, for others that begin alike
    (SmolLM2-135M in bf16: 23 KB each)."""
    inference_prompt_tokens: int = Field(default=1024, ge=64)
    """Most tokens of a completion's prompt; what is farther from the cursor is cut."""
    inference_load_wait_seconds: float = Field(default=60, ge=0)
    """How long a completion waits for the model to be loaded before it gets MODEL_LOADING; 0 refuses at once."""
    inference_max_rank: int = Field(default=64, ge=1)
    """Largest rank of an adapter that is served."""
    inference_device_adapters: int = Field(default=16, ge=2)
    """Places for adapters in device memory; a swap needs a second one until the old version has drained."""
    inference_host_adapter_mb: int = Field(default=1024, ge=0)
    """Most memory of adapters that wait in host memory, in MB; the latest used ones stay."""
    inference_disk_adapter_mb: int = Field(default=10240, ge=0)
    """Most space of adapters on the disk, in MB, below cache_dir/adapters, which replicas may share."""
    inference_reconcile_seconds: float = Field(default=15, gt=0)
    """How often the trainer is asked for the best checkpoint, beside its events."""
    inference_replica: str = Field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    """This replica's name in events and statuses."""
