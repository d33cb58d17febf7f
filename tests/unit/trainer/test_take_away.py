"""What leaves the house works elsewhere: in plain PEFT, in plain transformers, in llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import xllamacpp
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from codegraft.trainer.v1.adapter_pb2 import GGUF_TYPE_BF16, GGUF_TYPE_F16, GGUF_TYPE_Q8_0, GgufType
from services.core.errors import AdapterRejected, Cancelled, NotSupported, ResourceExhausted
from services.core.models.spelling import token_bytes
from services.trainer import checkpoint
from services.trainer.adapters import disk, gguf_file, gguf_tokenizer
from services.trainer.adapters.merge import Merged, Meter
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings
from tests.unit.trainer.whole import CODE, make_adapter, make_base, make_sentencepiece, make_tokenizer

KINDS = ["llama", "tied", "biased", "qwen2", "starcoder2"]
BIGCODE = "gpt_bigcode"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(base, adapter) of an architecture."""
    there: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in there:
            folder = tmp_path_factory.mktemp(kind)
            base = make_base(kind, folder / "base")
            there[kind] = base, make_adapter(base, folder / "adapter")
        return there[kind]

    return make


def ids() -> torch.Tensor:
    return torch.tensor([make_tokenizer().encode(CODE)])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids()).logits.float()
    return found


def with_peft(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter))


def test_plain_peft_computes_what_the_trainer_computed(
    trainee: Callable[[Settings], Trainee],
    settings: Callable[..., Settings],
    corpus: Callable[[Settings], Any],
    base: Path,
    tmp_path: Path,
) -> None:
    trained = trainee(settings())
    for name, master in trained.masters.items():
        if ".lora_B." in name:
            torch.nn.init.normal_(master.data, std=0.05)
    trained.publish()
    checkpoint.save_adapter(trained, tmp_path, "dir:/base")
    row = corpus(settings()).batch(0, 1)[0]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path).eval()
    end = row.positions.index(0, 1) if 0 in row.positions[1:] else len(row.ids)  # the row's first document
    with torch.no_grad():
        found = plain(torch.tensor([row.ids[:end]])).logits[0]
    losses = torch.nn.functional.cross_entropy(found, torch.tensor(row.labels[:end]), reduction="none")
    torch.testing.assert_close(trained.losses([row])[0][:end], losses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, BIGCODE])
def test_the_merged_model_says_what_base_and_adapter_say(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    base, adapter = made(kind)
    meter = Meter()
    Merged(base, adapter, "x").write(tmp_path, meter)
    assert meter.done > 0 and meter.phase == "merging"
    expected = with_peft(base, adapter)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    unchanged = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (found - unchanged).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path).encode(CODE) == make_tokenizer().encode(CODE)


def test_the_sum_is_made_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "to").mkdir()
    Merged(base, adapter, "x").write(tmp_path / "to", Meter())
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "to"))
    halves = load_file(adapter / "adapter_model.safetensors")
    path = "model.layers.1.mlp.down_proj"
    a, b = (halves[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB")
    assert torch.equal(after[f"{path}.weight"], (before[f"{path}.weight"].float() + 2 * (b @ a)).bfloat16())
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize("kind", KINDS[:1] + KINDS[2:])
@pytest.mark.parametrize(("type", "tolerance"), [(GGUF_TYPE_F16, 0.02), (GGUF_TYPE_BF16, 0.15), (GGUF_TYPE_Q8_0, 0.5)])
def test_the_gguf_file_says_nearly_the_same(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, type: GgufType, tolerance: float
) -> None:
    base, adapter = made(kind)
    gguf_file.write(Merged(base, adapter, "x"), tmp_path, "title", type, Meter())
    expected = with_peft(base, adapter)
    # llama.cpp takes the biases that it finds; transformers wants to be told of them.
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "biased" else {}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=gguf_file.FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        **biases,
    )
    found = logits(model)[..., : expected.shape[-1]]
    assert (found - expected).abs().max() < tolerance
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf_file.FILE)
    assert tokenizer.encode(CODE) == make_tokenizer().encode(CODE)


@pytest.mark.parametrize(("type", "tolerance"), [(GGUF_TYPE_F16, 0.02), (GGUF_TYPE_Q8_0, 0.5)])
def test_the_gguf_file_of_gpt_bigcode_says_nearly_the_same(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, type: GgufType, tolerance: float
) -> None:
    """transformers does not read it from GGUF, so its tensors are put back by the names that llama.cpp has."""
    base, adapter = made(BIGCODE)
    gguf_file.write(Merged(base, adapter, "x"), tmp_path, "title", type, Meter())
    read = gguf.GGUFReader(tmp_path / gguf_file.FILE)
    told = {name: field.contents() for name, field in read.fields.items()}
    assert told["general.architecture"] == "starcoder" and not any("rope" in name for name in told)
    counts = ("block_count", "attention.head_count", "attention.head_count_kv", "feed_forward_length", "context_length")
    assert [told[f"starcoder.{name}"] for name in counts] == [2, 4, 1, 256, 512]
    theirs = {
        "token_embd": "wte",
        "position_embd": "wpe",
        "output_norm": "ln_f",
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    waiting = set(model.state_dict()) - {"lm_head.weight"}  # llama.cpp takes the embedding for it, as this model does
    for tensor in read.tensors:
        *block, name, what = tensor.name.removeprefix("blk.").split(".")
        place = ".".join(["transformer", *(["h", *block] if block else []), theirs[name], what])
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        model.get_parameter(place).data.copy_(torch.from_numpy(values.copy()))
        waiting.remove(place)
        if name == "position_embd" or what == "bias":
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert not waiting
    assert (logits(model) - with_peft(base, adapter)).abs().max() < tolerance


@pytest.mark.parametrize("kind", [*KINDS, BIGCODE])
def test_llama_cpp_goes_on_as_base_and_adapter_do(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    _compare_with_llama_cpp(*made(kind), make_tokenizer(), tmp_path)


def test_llama_cpp_cuts_text_as_a_sentencepiece_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = make_sentencepiece()
    base = make_base("llama", tmp_path / "base", tokenizer=tokenizer)
    _compare_with_llama_cpp(base, make_adapter(base, tmp_path / "adapter"), tokenizer, tmp_path)


def _compare_with_llama_cpp(base: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    gguf_file.write(Merged(base, adapter, "x"), folder, "title", GGUF_TYPE_F16, Meter())
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / gguf_file.FILE)
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 256, 1, 1
    parameters.port, parameters.warmup, parameters.verbosity = 0, False, -1
    foreign = xllamacpp.Server(parameters)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    spellings = token_bytes(tokenizer)
    for prompt in (CODE, CODE[:20], CODE[5:15], "return 1\n"):
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        answer = foreign.handle_completions({"prompt": prompt, "max_tokens": 4, "temperature": 0.0})
        expected = b"".join(spellings[token] for token in tokens.tolist() if token < len(spellings))
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
        assert answer["choices"][0]["text"] == expected.decode(errors="replace")


def test_what_gguf_has_no_form_for_is_refused_with_the_way_out(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = made("tied")
    merged = Merged(base, adapter, "x")
    config = json.loads((base / "config.json").read_text())
    yarn = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    for change, what in (
        ({"model_type": "gpt_neox"}, "llama, qwen2, starcoder2, gpt_bigcode"),
        ({"rope_parameters": yarn}, "convert_hf_to_gguf"),
    ):
        merged.base = tmp_path / what[:4]
        merged.base.mkdir()
        (merged.base / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(NotSupported) as caught:
            gguf_file.write(merged, tmp_path, "title", GGUF_TYPE_Q8_0, Meter())
        assert caught.value.field == "format" and what in caught.value.hint


def test_gpt_bigcode_with_keys_for_every_head_is_refused(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Its rows of q, k and v alternate head by head; llama.cpp knows one head of keys only."""
    with pytest.raises(NotSupported, match="multi_query") as caught:
        gguf_file.write(Merged(*made("gpt_bigcode, all heads"), "x"), tmp_path, "title", GGUF_TYPE_F16, Meter())
    assert caught.value.field == "format" and "MERGED" in caught.value.hint


SPLIT = {"type": "Split", "behavior": "Isolated"}
WHOLE = {"type": "ByteLevel", "use_regex": False}
RULES: list[tuple[list[dict[str, Any]], str]] = [
    ([{"type": "ByteLevel", "use_regex": True}], "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "starcoder"),
    ([{**SPLIT, "pattern": {"Regex": r"(?i:'s)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s]+"}}, WHOLE], "qwen2"),
    ([{**SPLIT, "pattern": {"Regex": r"(?i:'s)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s]+"}}, WHOLE], "llama-bpe"),
    (
        [
            *({**SPLIT, "pattern": {"Regex": regex}} for regex in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+")),
            {"type": "Digits", "individual_digits": True},
            WHOLE,
        ],
        "deepseek-coder",
    ),
]


@pytest.mark.parametrize(("rules", "name"), RULES)
def test_the_rules_of_a_tokenizer_are_known_by_their_pieces(rules: list[dict[str, Any]], name: str) -> None:
    found = gguf_tokenizer._rules({"type": "Sequence", "pretokenizers": rules} if len(rules) > 1 else rules[0])
    assert found == name


@pytest.mark.parametrize("rules", [None, {"type": "Whitespace"}, WHOLE, {**SPLIT, "pattern": {"Regex": "x"}}])
def test_unknown_rules_get_no_name(rules: dict[str, Any] | None) -> None:
    with pytest.raises(NotSupported):
        gguf_tokenizer._rules(rules)


def test_a_full_disk_and_a_caller_who_left_end_a_conversion(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, meter = Merged(*made("llama"), "x"), Meter()
    meter.stop()
    with pytest.raises(Cancelled):
        merged.write(tmp_path, meter)
    monkeypatch.setattr(disk, "SPARE_BYTES", 2**62)
    for write in (merged.write, lambda to, m: gguf_file.write(merged, to, "t", GGUF_TYPE_Q8_0, m)):
        with pytest.raises(ResourceExhausted) as caught:
            write(tmp_path, Meter())
        assert "CODEGRAFT_CACHE_DIR" in caught.value.hint


def test_weights_that_lie_under_other_names_are_not_silently_left_unmerged(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = made("llama")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    tensors = {f"other.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotSupported):
        Merged(tmp_path, adapter, "x")


def test_an_adapter_of_another_model_is_not_merged(made: Callable[[str], tuple[Path, Path]]) -> None:
    with pytest.raises(AdapterRejected):
        Merged(made("starcoder2")[0], made("llama")[1], "x")
