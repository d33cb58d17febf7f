"""docs/adding-a-base-model.md, followed to the letter with a tiny model of random weights."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from services.core.models import catalogue
from services.core.models.spec import ModelSpec
from tests.unit.core.test_models import (
    test_sizes_of_the_catalogue_make_up_its_numbers_of_weights as check_sizes,
)
from tests.unit.core.test_models import (
    test_what_the_catalogue_says_of_tokens_is_what_prompts_make_of_them as check_tokens,
)
from tests.unit.inference import test_architectures, tiny
from tools.contract import ROOT

PAGE = (ROOT / "docs" / "adding-a-base-model.md").read_text(encoding="utf-8")
STEPS = re.findall(r"```python\n(.*?)```\n(?:[^`]*?\n)?```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("Tiny-Code")
    markers = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>", "<|repo_name|>")
    tokenizer = tiny.make_tokenizer(*markers)
    tiny.make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def followed(folder: Path) -> dict[str, Any]:
    """What the page's code has made, each step in the namespace of those before; it printed what stands there."""
    assert len(STEPS) == PAGE.count("```python") == 4
    made: dict[str, Any] = {"folder": folder}
    for code, expected in STEPS:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, made)
        assert printed.getvalue() == expected
    return made


def test_the_page_does_what_it_says(followed: dict[str, Any]) -> None:
    assert followed["sequence"].tokens[: len(followed["asked"].ids)] == followed["asked"].ids


def test_the_entry_would_pass_the_tests_of_the_catalogue(followed: dict[str, Any]) -> None:
    entry: ModelSpec = followed["entry"]
    check_sizes(entry)
    check_tokens(entry)


def test_the_types_that_are_named_are_those_that_are_proven() -> None:
    told = re.search(r"The types are llama \([^)]*\),\s+(.*?)\.\s", PAGE, re.DOTALL)
    assert told is not None
    named = {"llama", *re.split(r",\s+|\s+and\s+", " ".join(told[1].split()))}
    assert named == {config.model_type for config in test_architectures.CONFIGS.values()}
    assert named == set(catalogue._TARGETS_BY_TYPE)


def test_files_and_names_of_the_code_exist() -> None:
    for path in set(re.findall(r"`((?:services|tests)/[\w/]+\.py)`", PAGE)):
        assert (ROOT / path).is_file(), path
    sources = "\n".join(path.read_text() for path in (ROOT / "services/core/models").rglob("*.py"))
    for name in ("class Family", "needs:", "STOP_MARKERS =", "_TARGETS_BY_TYPE =", "def _shape"):
        assert name in sources
