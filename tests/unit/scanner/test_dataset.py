"""Datasets, reports and logs: what is written is what was decided, in the same bytes for the same input."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import datasets
import duckdb
import polars
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegraft.scanner.v1.scan_pb2 import ScanSettings
from services.core.errors import InvalidMask, InvalidPageSize, InvalidPageToken
from services.scanner import dataset, report, verdict_log
from services.scanner.dataset import Origin
from services.scanner.loss import Threshold
from services.scanner.verdict import Verdict
from services.scanner.verdict_log import Filter

ORIGIN = Origin("projects/p", "projects/p/snapshots/0123", "smollm2-135m", "d" * 64)


def verdict(number: int, *, accepted: bool = True, loss: float | None = 1.0, language: str = "Python") -> Verdict:
    return Verdict(
        path=f"src/m{number:03}.py",
        source="projects/p/sources/s",
        sha256=f"{number:064x}",
        size=100 + number,
        language=language,
        split=("TEST" if number % 10 == 0 else "TRAIN") if accepted else "",
        accepted=accepted,
        stage=2 if loss is not None else 1,
        reason="ACCEPTED" if accepted else "HIGH_LOSS",
        reasons=("ACCEPTED",) if accepted else ("HIGH_LOSS",),
        details=("",),
        loss=loss,
        tokens=30 + number,
        sampled_tokens=30 + number,
    )


ROWS = [verdict(number) for number in range(40)] + [verdict(n, accepted=False, loss=4.5) for n in range(40, 60)]


def text_of(sha256: str) -> str:
    return f"value = {int(sha256, 16)}  # ünïcode\r\n"


def test_the_same_input_gives_the_same_digest_in_any_order() -> None:
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert dataset.manifest(ORIGIN, shuffled) == dataset.manifest(ORIGIN, ROWS)


@pytest.mark.parametrize("change", [{"split": "TEST"}, {"sha256": "e" * 64}, {"path": "other.py"}, {"language": "Go"}])
def test_another_row_gives_another_digest(change: dict[str, str]) -> None:
    changed = [replace(ROWS[1], **change), ROWS[0], *ROWS[2:]]
    assert dataset.digest_of(ORIGIN, changed) != dataset.digest_of(ORIGIN, ROWS)


def test_another_origin_gives_another_digest_but_the_last_digits_of_a_loss_do_not() -> None:
    assert dataset.digest_of(replace(ORIGIN, model_digest="e" * 64), ROWS) != dataset.digest_of(ORIGIN, ROWS)
    assert dataset.digest_of(ORIGIN, [replace(row, loss=row.loss and row.loss + 1e-6) for row in ROWS]) == (
        dataset.digest_of(ORIGIN, ROWS)
    )


def test_files_are_the_same_bytes_and_open_elsewhere(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, rows in zip(folders, (ROWS, ROWS[::-1]), strict=True):
        folder.mkdir()
        dataset.write(rows, text_of, folder)
        dataset.write_verdicts(rows, folder / dataset.VERDICTS)
    for name in ("train/part-00000.parquet", "test/part-00000.parquet", dataset.VERDICTS):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    manifest = dataset.manifest(ORIGIN, ROWS)
    files, tokens = duckdb.sql(f"select count(*), sum(tokens) from '{folders[0]}/train/*.parquet'").fetchall()[0]
    assert (
        (files, tokens) == (manifest.train.files, manifest.train.tokens) == (36, sum(r.tokens for r in ROWS[:40]) - 180)
    )
    assert duckdb.sql(f"select text from '{folders[0]}/test/*.parquet' order by path").fetchall()[1] == (text_of("a"),)
    assert pq.read_schema(folders[0] / dataset.VERDICTS) == dataset.VERDICT_SCHEMA


def test_a_large_dataset_has_shards_that_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SHARD_BYTES", 1000)
    written = dataset.write(ROWS, text_of, tmp_path)
    train = [row for row in ROWS if row.split == "TRAIN" and row.accepted]
    assert sorted(written) == ["test/part-00000.parquet", *(f"train/part-{n:05}.parquet" for n in range(5))]
    sizes = [sum(pq.read_table(path)["size"].to_pylist()) for name, path in written.items() if "train" in name]
    assert max(sizes) - min(sizes) < 400
    for table in (
        duckdb.sql(f"select path from '{tmp_path}/train/*.parquet'").fetchall(),
        polars.read_parquet(tmp_path / "train").select("path").rows(),
        [(row["path"],) for row in pq.read_table(tmp_path / "train").to_pylist()],
        [
            (row["path"],)
            for row in datasets.load_dataset("parquet", data_dir=str(tmp_path), cache_dir=str(tmp_path / "c"))["train"]
        ],
    ):
        assert table == [(row.path,) for row in train]


def test_a_dataset_without_test_files_opens_too(tmp_path: Path) -> None:
    dataset.write([row for row in ROWS if row.split != "TEST"], text_of, tmp_path)
    assert duckdb.sql(f"select count(*) from '{tmp_path}/test/*.parquet'").fetchall() == [(0,)]


def test_the_manifest_says_how_it_was_made() -> None:
    origin = replace(ORIGIN, settings=ScanSettings(max_loss=2.5, languages_off=["SQL"]))
    found = dataset.manifest(origin, ROWS)
    assert (dict(found.languages), dict(found.reasons)) == ({"Python": 40}, {"ACCEPTED": 40, "HIGH_LOSS": 20})
    assert (found.settings["max_loss"], list(found.settings["languages_off"])) == (2.5, ["SQL"])
    assert found.digest != dataset.manifest(ORIGIN, ROWS).digest


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["Python", "Go"])), max_size=30))
def test_accepted_and_rejected_are_all_files(kinds: list[tuple[bool, str]]) -> None:
    rows = [verdict(n, accepted=accepted, language=language) for n, (accepted, language) in enumerate(kinds)]
    found = report.summarize(rows)
    assert found.accepted_count + found.rejected_count == found.file_count == len(rows)
    assert sum(count.files for count in found.reasons.values()) == len(rows)
    assert sum(count.files for count in found.languages.values()) == found.accepted_count
    assert found.train.files + found.test.files == found.accepted_count


def test_a_language_that_loses_many_files_to_the_loss_is_told() -> None:
    rows = [verdict(n, accepted=n >= 2, loss=1.0, language="Go") for n in range(40)]
    rows += [verdict(n, accepted=n >= 3, loss=1.0, language="Python") for n in range(40)]
    rows += [verdict(n, accepted=False, loss=1.0, language="Rare") for n in range(3)]
    thresholds = {
        language: Threshold(3.0, count, 1.0, 0.1) for language, count in [("Go", 40), ("Python", 40), ("Rare", 3)]
    }
    found = report.summarize(rows, thresholds=thresholds)
    assert [warning.split()[0] for warning in found.warnings] == ["Python"]
    assert {language: count.rejected for language, count in found.losses.items()} == {"Go": 2, "Python": 3, "Rare": 3}
    assert {language: count.files for language, count in found.all_languages.items()} == {
        "Go": 40,
        "Python": 40,
        "Rare": 3,
    }


def test_verdicts_of_an_older_release_can_be_read() -> None:
    row = {
        "path": "a",
        "source": "s",
        "sha256": "0",
        "size": 1,
        "language": "",
        "split": "",
        "accepted": False,
        "stage": 1,
    }
    old = Verdict.of_row(
        row | {"reason": "NOT_TEXT", "reasons": ["NOT_TEXT"], "detail": "binary", "loss": None, "gone": 1}
    )
    assert (old.detail, old.details, old.encoding, old.similarity) == ("binary", ("binary",), "", 0.0)


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / dataset.VERDICTS
    rows = [*ROWS, verdict(60, accepted=False, loss=None, language="")]
    dataset.write_verdicts(rows, path)
    return path


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (Filter(), 61),
        (Filter(accepted=True), 40),
        (Filter(accepted=False), 21),
        (Filter(reasons=frozenset({"HIGH_LOSS"}), languages=frozenset({"Python"})), 20),
        (Filter(min_loss=4.5), 20),
        (Filter(max_loss=4.4), 40),
        (Filter(path="m00*"), 10),
        (Filter(path="other/**"), 0),
    ],
)
def test_filters(log_file: Path, wanted: Filter, count: int) -> None:
    page = verdict_log.page(log_file, "scan", wanted, 1000, "")
    assert (page.total, len(page.verdicts), page.next_page_token) == (count, count, "")


def test_pages_give_every_verdict_once(log_file: Path) -> None:
    seen: list[Verdict] = []
    token, pages = "", 0
    while pages == 0 or token:
        page = verdict_log.page(log_file, "scan", Filter(accepted=True), 7, token)
        seen, token, pages = [*seen, *page.verdicts], page.next_page_token, pages + 1
    assert (seen, pages) == (ROWS[:40], 6)


def test_a_token_belongs_to_its_scan_and_filter(log_file: Path) -> None:
    token = verdict_log.page(log_file, "scan", Filter(), 7, "").next_page_token
    for scan, wanted, given_token in (
        ("other", Filter(), token),
        ("scan", Filter(accepted=True), token),
        ("scan", Filter(), "garbage"),
        ("scan", Filter(), "ü"),
    ):
        with pytest.raises(InvalidPageToken):
            verdict_log.page(log_file, scan, wanted, 7, given_token)


def test_bad_requests(log_file: Path) -> None:
    with pytest.raises(InvalidPageSize):
        verdict_log.page(log_file, "scan", Filter(), -1, "")
    with pytest.raises(InvalidMask):
        verdict_log.page(None, "scan", Filter(path="!"), 0, "")
    assert verdict_log.page(None, "scan", Filter(), 0, "").total == 0
