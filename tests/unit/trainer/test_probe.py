"""Serving comes to what the trainer says of an adapter's answer to a fixed prompt, and of other weights it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core.errors import AdapterRejected
from services.core.models import adapter_files, probe, weights
from services.inference import model as serving
from services.inference.adapters import verify
from services.inference.engine.scheduler import Limits
from services.trainer import checkpoint
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings


def test_serving_comes_to_what_the_trainer_says_of_an_adapter(
    base: Path,
    trainee: Callable[[Settings], Trainee],
    settings: Callable[..., Settings],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    trained, ids = trainee(settings()), probe.prompt(tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for master in trained.masters.values():
            master += torch.randn(master.shape, generator=generator) * 0.05
    trained.publish()
    best = trained.weights()
    with torch.no_grad():
        for master in trained.masters.values():
            master *= 1.5
    trained.publish()
    loaded = serving.start(
        copy.deepcopy(weights.load_model(base, torch.float32)), tokenizer, "tiny", "d", Limits(kv_tokens=512)
    )
    try:
        told = {}
        for name, worn in (("best", best), ("newest", None)):
            files, sha256 = checkpoint.save_adapter(trained, tmp_path / name, "tiny", worn)
            told[name] = checkpoint.probe_adapter(trained, ids, worn)
            manifest = AdapterManifest(name=name, sha256=sha256, base_digest="d", lora_r=settings().lora_r)
            scale = verify.check_config(files[adapter_files.CONFIG].read_bytes(), manifest)
            pairs = verify.check_tensors(load_file(files[adapter_files.WEIGHTS]), manifest, loaded.base)
            here = loaded.probe(loaded.prepare(pairs, scale, sha256), told[name].ids)
            assert here == pytest.approx(list(told[name].losses), abs=1e-3) and len(here) == len(ids) - 1
            verify.check_probe(name, told[name], here)
        assert told["best"].losses != told["newest"].losses
        path = next(path for path in pairs if path.endswith("down_proj"))
        pairs[path] = (pairs[path][0], -20 * pairs[path][1])
        here = loaded.probe(loaded.prepare(pairs, scale, "altered"), ids)
        with pytest.raises(AdapterRejected, match="not the adapter that was trained"):
            verify.check_probe(name, told[name], here)
    finally:
        loaded.engine.stop()
