"""Tiny models of several architectures with whole tokenizers, and adapters that change what they say."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Starcoder2Config,
)

MERGES = [("Ġ", "Ġ"), ("d", "e"), ("de", "f"), ("r", "e"), ("t", "u")]
CODE = "def f(x):\n    return x + 1234  # é\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges: a GGUF file without merges is not read."""
    vocabulary = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary.update({left + right: len(vocabulary) + n for n, (left, right) in enumerate(MERGES)})
    bpe = Tokenizer(models.BPE(vocabulary, MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """What transformers makes of a SentencePiece model, as CodeLlama's: spaces are letters, and bytes a last resort."""
    vocabulary = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>"])}
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    merges = [
        ("▁", "▁"),
        ("d", "e"),
        ("r", "e"),
        ("▁", "x"),
        ("de", "f"),
        ("▁", "def"),
        ("t", "u"),
        ("re", "tu"),
        ("e", "t"),
    ]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    for char in "▁" + string.ascii_letters + string.digits + string.punctuation:
        vocabulary.setdefault(char, len(vocabulary))
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    bpe.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_base(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """A random model of that architecture in a folder, with a tokenizer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,  # some models pad their embeddings
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": len(tokenizer) - 1,
        "initializer_range": 0.3,
    }
    config = {
        "llama": lambda: LlamaConfig(**sizes),
        "tied": lambda: LlamaConfig(**sizes, tie_word_embeddings=True),
        "biased": lambda: LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),  # granite-code
        "qwen2": lambda: Qwen2Config(**sizes),
        "starcoder2": lambda: Starcoder2Config(**sizes),
        "gpt_bigcode": lambda: bigcode(sizes),  # granite-code 20B
        "gpt_bigcode, all heads": lambda: bigcode(sizes, multi_query=False),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0.5, 0.3)  # norms and biases that matter
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bigcode(sizes: dict[str, Any], **more: Any) -> GPTBigCodeConfig:
    """These sizes in the names of this architecture; learned positions, an MLP of four times the width."""
    return GPTBigCodeConfig(
        vocab_size=sizes["vocab_size"],
        n_embd=sizes["hidden_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        n_positions=sizes["max_position_embeddings"],
        bos_token_id=None,
        eos_token_id=sizes["eos_token_id"],
        initializer_range=sizes["initializer_range"],
        **more,
    )


def make_adapter(base: Path, folder: Path, *, rank: int = 4, **options: Any) -> Path:
    """A PEFT directory with an adapter of random weights on every linear layer of the base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = options.pop("target_modules", "all-linear")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    adapted.peft_config["default"].base_model_name_or_path = "somewhere/else"
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder
