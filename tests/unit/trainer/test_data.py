"""From files to rows: every token is trained in every epoch, middles stay with their surroundings, rows are full."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.core import errors
from services.core.models import prompts
from services.core.models.prompts import PromptFormat
from services.trainer import job
from services.trainer.corpus.data import Corpus, Document, read_part
from services.trainer.corpus.packing import Row, pack
from services.trainer.planning.initial import inherited
from services.trainer.planning.settings import Settings
from tests.unit.core import tokenizers
from tests.unit.trainer.conftest import SMALL

QWEN = tokenizers.of("qwen")
FORMATS = {
    "qwen": (QWEN, prompts.detect(QWEN)),
    "sentinels": (tokenizers.of("plain"), prompts.with_sentinels(prompts.detect(tokenizers.of("plain")))),
}


def real_files(count: int, most: int = 30_000) -> list[Document]:
    """Python files of the standard library, small and large."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.glob("*.py")) if 0 < path.stat().st_size < most][:count]
    return [Document(path.name, "s", path.read_text(errors="replace"), "Python") for path in files]


def corpus(
    family: str, documents: Sequence[Document], window: int = 256, fim_rate: float = 0.5, seed: int = 3
) -> Corpus:
    tokenizer, fmt = FORMATS.get(family) or (tokenizers.of(family), prompts.detect(tokenizers.of(family)))
    return Corpus(documents, tokenizer, fmt, window=window, fim_rate=fim_rate, seed=seed)


def epoch_rows(made: Corpus) -> list[Row]:
    return made.batch(0, made.counts().rows)


def documents_of(rows: Sequence[Row]) -> list[list[int]]:
    """The documents, or what of them lies in one row, ids and last label."""
    found = []
    for row in rows:
        starts = [n for n, position in enumerate(row.positions) if position == 0] + [len(row.ids)]
        found += [[*row.ids[a:b], row.labels[b - 1]] for a, b in pairwise(starts)]
    return found


# --- packing ---

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


@settings(max_examples=150, deadline=None)
@given(loose=LENGTHS, whole=st.lists(st.integers(1, 17), max_size=30), window=st.just(16))
def test_every_token_but_the_first_is_a_label_once(loose: list[int], whole: list[int], window: int) -> None:
    numbers = iter(range(10**6))
    parts = [[[next(numbers) for _ in range(length)] for length in lengths] for lengths in (loose, whole)]
    rows = pack(parts[0], window, whole=parts[1])
    labels = sorted(label for row in rows for label in row.labels)
    assert labels == sorted(token for part in parts for ids in part for token in ids[1:])
    assert all(len(row.ids) == len(row.labels) == len(row.positions) <= window for row in rows)
    pieces = documents_of(rows)
    assert all(ids in pieces for ids in parts[1] if len(ids) > 1), "a whole document lies in one row"
    for piece in pieces:
        assert piece == list(range(piece[0], piece[0] + len(piece)))


def test_loose_documents_fill_the_gaps() -> None:
    rows = pack([list(range(100, 200))], 64, whole=[list(range(50)), list(range(40))])
    assert [len(row.ids) for row in rows] == [64, 64, 59]


# --- the corpus ---


@pytest.mark.parametrize("family", ["real qwen", "sentinels"])
@pytest.mark.parametrize(("fim_rate", "least"), [(0.0, 0.99), (0.5, 0.98), (1.0, 0.95)])
def test_rows_of_real_files_are_full(family: str, fim_rate: float, least: float) -> None:
    made = corpus(family, real_files(16), window=512, fim_rate=fim_rate)
    counts = made.counts()
    rows = epoch_rows(made)
    assert counts.labels == sum(len(row.ids) for row in rows) and counts.rows == len(rows)
    assert counts.padding == 512 * counts.rows - counts.labels
    assert counts.labels / (counts.labels + counts.padding) >= least
    assert counts.tokens - counts.labels == counts.pieces and counts.documents == 16 and not counts.empty_documents
    if fim_rate == 1.0:  # but for the cuts that happen to reach the end
        assert counts.fim_pieces > 0.9 * counts.pieces
    else:
        assert counts.fim_pieces == pytest.approx(fim_rate * counts.pieces, rel=0.25)


@pytest.mark.parametrize("family", FORMATS)
def test_all_text_of_every_file_is_trained_in_every_epoch(family: str) -> None:
    documents = [
        *real_files(6),
        Document("min.js", "s", ";".join(f"x{n}=f({n})" for n in range(900)), "JavaScript"),
        Document("e", "s", "é☺" * 700),
    ]
    made = corpus(family, documents)
    tokenizer, fmt = FORMATS[family]
    for epoch in range(2):
        whole, loose = made._draw(epoch)
        texts: dict[str, list[str]] = {}
        for ids in [*whole, *(list(ids) for ids in loose)]:
            path, text = _read(tokenizer, fmt, ids)
            texts.setdefault(path, []).append(text)
        for document in documents:
            assert sum(map(len, texts[document.path])) == len(document.text)
            left = document.text
            for text in sorted(texts[document.path], key=document.text.find):
                assert text in document.text
                left = left.replace(text, "", 1)
            assert not left, "every piece once"


def _read(tokenizer: tokenizers.PreTrainedTokenizerFast, fmt: PromptFormat, ids: list[int]) -> tuple[str, str]:
    """(path, text) that a document was made of."""
    ends = (fmt.eot_id, fmt.end_of_middle_id)
    ids = ids[:-1] if ids[-1] in ends else ids
    decode = tokenizer.decode
    if fmt.suffix_id not in ids:
        path, _, text = decode(ids[1:]).partition("\n")
        return path, text
    assert fmt.suffix_id is not None and fmt.prefix_id is not None
    suffix, prefix = ids.index(fmt.suffix_id), ids.index(fmt.prefix_id)
    if fmt.style == "continued":
        path, _, text = decode(ids[prefix + 2 :]).partition("\n")
        return path, text + decode(ids[suffix + 1 : prefix])
    assert fmt.middle_id is not None
    middle = ids.index(fmt.middle_id)
    path = decode(ids[1:prefix]).rstrip("\n")
    return path, decode(ids[prefix + 1 : suffix]) + decode(ids[middle + 1 :]) + decode(ids[suffix + 1 : middle])


@pytest.mark.parametrize("family", FORMATS)
def test_a_middle_lies_in_one_row_with_its_prefix_and_suffix(family: str) -> None:
    made = corpus(family, real_files(8), fim_rate=0.7)
    fmt = FORMATS[family][1]
    found = documents_of(epoch_rows(made))
    middles = [ids for ids in found if fmt.suffix_id in ids]
    assert len(middles) == made.counts().fim_pieces > 50
    assert all(fmt.prefix_id in ids and ids[-1] == fmt.end_of_middle_id for ids in middles)


def test_only_the_last_piece_of_a_file_ends_it() -> None:
    made = corpus("qwen", [Document("a.py", "s", "value = 1\n" * 500, "Python")], fim_rate=0.01)
    whole, loose = made._draw(0)
    fmt = FORMATS["qwen"][1]
    assert not whole and len(loose) > 3
    assert sum(fmt.eot_id in ids for ids in loose) == 1 and all(ids[0] == fmt.path_id for ids in loose)


def test_cuts_are_drawn_anew_every_epoch_and_by_the_seed_alone() -> None:
    documents = real_files(4)
    made = corpus("qwen", documents)
    epochs = [made._draw(epoch)[0] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert [corpus("qwen", documents)._draw(epoch)[0] for epoch in reversed(range(3))] == epochs[::-1]
    assert corpus("qwen", documents, seed=4)._draw(0)[0] != epochs[0]


def test_a_window_without_room_is_trained_plain() -> None:
    made = corpus("qwen", [Document("long/" * 30 + "a.py", "s", "x = 1\n" * 200, "Python")], window=64, fim_rate=1.0)
    counts = made.counts()
    assert (counts.pieces, counts.fim_pieces) == (1, 0) and counts.labels == counts.tokens - 1


def test_files_without_a_token_are_counted() -> None:
    tokenizer, fmt = FORMATS["qwen"]
    documents = [Document("", "s", ""), Document("a.py", "s", "x = 1\n")]
    made = Corpus(documents, tokenizer, fmt, window=64, fim_rate=0.5, seed=0)
    assert (made.counts().documents, made.counts().empty_documents) == (2, 1)


def test_the_language_comes_with_the_dataset(tmp_path: Path) -> None:
    columns = {"path": ["a.go"], "source": ["s"], "text": ["x"], "tokens": [1], "loss": [2.0], "language": ["Go"]}
    for number, left_out in enumerate(["", "language"]):
        table = pa.table({name: values for name, values in columns.items() if name != left_out})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    for number, language in enumerate(["Go", ""]):
        part = read_part(tmp_path / f"{number}.parquet")
        assert (part.documents, part.base_loss) == ([Document("a.go", "s", "x", language)], 2.0)


# --- sentinels ---


@pytest.mark.parametrize(
    ("family", "fim_rate", "expected"),
    [("plain", 0.0, "plain"), ("plain", 0.5, "sentinels"), ("qwen", 0.0, "qwen"), ("qwen", 0.5, "qwen")],
)
def test_a_run_uses_sentinels_where_the_base_has_no_markers(family: str, fim_rate: float, expected: str) -> None:
    base_format = prompts.detect(tokenizers.of(family))
    assert job.format_of(base_format, Settings(**{**SMALL, "fim_rate": fim_rate})).name == expected


def test_a_vocabulary_without_spare_tokens_cannot_be_taught() -> None:
    base_format = prompts.detect(tokenizers.byte_level(["<|endoftext|>"]))
    with pytest.raises(errors.InvalidHyperparameter) as refused:
        job.format_of(base_format, Settings(**{**SMALL, "fim_rate": 0.5}))
    assert refused.value.field == "hyperparameters.fim_rate" and "fim_rate to 0" in refused.value.hint


def test_a_run_that_starts_from_a_taught_adapter_keeps_its_sentinels() -> None:
    manifest = AdapterManifest(
        lora_r=8, lora_alpha=16, prompt_format="sentinels", fim_sentinels=["<gh_stars>", "<issue_start>"]
    )
    manifest.hyperparameters.fim_rate = 0.4
    assert inherited(Hyperparameters(), manifest).fim_rate == 0.4
    assert inherited(Hyperparameters(fim_rate=0.0), manifest).fim_rate == 0.0
    base_format = prompts.detect(tokenizers.of("plain"))
    settings = Settings(**{**SMALL, "fim_rate": 0.4})
    assert job.format_of(base_format, settings, manifest.fim_sentinels).sentinels == ("<gh_stars>", "<issue_start>")
