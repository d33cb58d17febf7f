"""Near-duplicates: shingles and estimates against plain Python's, and groups that no order and no sharding changes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.scanner import near, near_groups

Signatures = NDArray[np.uint32]
TEXTS = st.lists(st.text("ab_Z9 .\n-é€𝄞", max_size=60), max_size=8)


def words(text: str) -> list[str]:
    return re.findall("[0-9A-Za-z_\x80-\U0010ffff]+", text)


def shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + 5]) for start in range(max(1, len(found) - 4))} if found else set()


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def code(rng: random.Random, count: int) -> list[str]:
    return [f"{rng.choice('abcdef')}{rng.randrange(300)}" for _ in range(count)]


def changed(tokens: Sequence[str], share: float, rng: random.Random) -> list[str]:
    return [f"new{rng.randrange(10**6)}" if rng.random() < share else token for token in tokens]


@given(TEXTS)
def test_shingles_are_those_of_plain_python(texts: list[str]) -> None:
    hashes, ends = near.shingles([text.encode() for text in texts])
    starts = [0, *ends.tolist()]
    found = [set(hashes[start:end].tolist()) for start, end in pairwise(starts)]
    for a, a_found in zip(texts, found, strict=True):
        for b, b_found in zip(texts, found, strict=True):
            assert len(a_found & b_found) == len(shingles(a) & shingles(b))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 63, 64, 65, 1000])
def test_every_byte_of_a_word_counts(length: int) -> None:
    word = "x" * length
    variants = [word, *(word[:place] + "y" + word[place + 1 :] for place in range(length)), word + "x"]
    hashes, _ = near.shingles([variant.encode() for variant in variants])
    assert len(set(hashes.tolist())) == length + 2


@given(TEXTS)
def test_a_signature_does_not_depend_on_its_batch(texts: list[str]) -> None:
    alone = [near.signatures([text])[0] for text in texts]
    assert near.signatures(texts).tolist() == [signature.tolist() for signature in alone]


def test_many_texts_and_long_ones_are_taken_in_several_batches() -> None:
    rng = random.Random(0)
    texts = ["a b c d e f", " ".join(code(rng, 100_000)), *(" ".join(code(rng, 9)) for _ in range(300)), "a b c d e f"]
    found = near.signatures(texts)
    assert found.shape == (303, near.ROWS)
    assert near.similarity(found[0], found[-1]) == 1.0
    assert near.similarity(found[1], near.signatures([texts[1]])[0]) == 1.0


@pytest.mark.parametrize("kernel", ["", "scalar"])
def test_signatures_are_the_same_in_every_process_and_on_every_machine(kernel: str) -> None:
    script = """if True:
        import hashlib
        from services.scanner import near
        code = "def area(width, height):\\n    return width * height\\n" * 3
        texts = [code, "größe = 1", "", "\\udc80 lone", "w" * 100, " ".join(map(str, range(5000)))]
        print(hashlib.sha256(near.signatures(texts).astype("<u4").tobytes()).hexdigest())
    """
    # rensa's code without vector instructions, as on a processor that it knows none of.
    environment = {**os.environ, "RENSA_FORCE_KERNEL": kernel, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "1ab27e65bb746f0787839952eb77600600abad45939241737190faef7a88f9d8"


def test_few_words_are_one_shingle_and_none_is_like_nothing() -> None:
    one, same, other, none, blank = near.signatures(["return x", "return(x)\n", "return y", "", "{ }"])
    assert near.similarity(one, same) == 1.0
    assert near.similarity(one, other) == 0.0
    assert near.similarity(none, blank) == near.similarity(one, none) == 0.0
    assert near.signatures([]).shape == (0, near.ROWS)


@pytest.mark.parametrize("count", [12, 60, 400, 5000])
def test_estimates_are_close_to_the_exact_similarity(count: int) -> None:
    rng = random.Random(count)
    errors = []
    for _ in range(40):
        tokens = code(rng, count)
        texts = [" ".join(tokens), " ".join(changed(tokens, rng.uniform(0, 0.1), rng))]
        errors.append(float(near.similarity(*near.signatures(texts))) - jaccard(*texts))
    assert max(map(abs, errors)) < 0.12
    assert abs(sum(errors) / len(errors)) < 0.02


def test_bands_find_what_is_worth_comparing() -> None:
    bands = near.bands(0.7)
    assert bands == near.Bands(count=32, rows=8)
    assert bands.found(0.7) > near.MIN_FOUND and bands.found(0.85) > 0.999 and bands.found(0.4) < 0.05
    assert near.bands(1.0) == near.Bands(1, near.ROWS)
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="threshold"):
            near.bands(wrong)


def family(count: int, similarity: float, seed: int = 0) -> Signatures:
    """Signatures each two of which agree in about that share of their rows."""
    rng = np.random.default_rng(seed)
    original = rng.integers(0, near.EMPTY, near.ROWS, np.uint32)
    others = rng.integers(0, near.EMPTY, (count, near.ROWS), np.uint32)
    return np.where(rng.random((count, near.ROWS)) < similarity**0.5, original, others)


def groups_of(shards: Sequence[tuple[Sequence[int], Signatures]], threshold: float = 0.7) -> set[frozenset[int]]:
    """The groups among the keys and signatures of some shards."""
    with tempfile.TemporaryDirectory() as name:
        paths = write(Path(name), shards)
        with near_groups.opened(paths, Path(name), threshold=threshold) as search:
            members: defaultdict[int, set[int]] = defaultdict(set)
            for key, group in search.groups():
                members[group].add(key)
    assert all(group == min(keys) and len(keys) > 1 for group, keys in members.items())
    return {frozenset(keys) for keys in members.values()}


def write(folder: Path, shards: Sequence[tuple[Sequence[int], Signatures]]) -> list[Path]:
    paths = []
    for number, (keys, signatures) in enumerate(shards):
        columns = [pa.array(keys, pa.int64()), near_groups.signature_column(signatures), pa.array(["x"] * len(keys))]
        paths.append(folder / f"{number}.parquet")
        pq.write_table(
            pa.table(columns, pa.schema([near_groups.KEY, near_groups.SIGNATURE, ("path", "str")])), paths[-1]
        )
    return paths


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), shards=st.integers(1, 5), rng=st.randoms(use_true_random=False))
def test_neither_order_nor_shards_nor_keys_matter(seed: int, shards: int, rng: random.Random) -> None:
    sizes = [(1, 1.0), (7, 0.73), (30, 0.72), (40, 0.6), (12, 1.0), (3, 0.9), (25, 0.7)]
    signatures = np.concatenate([family(size, alike, seed + at) for at, (size, alike) in enumerate(sizes)])
    plain = groups_of([(range(len(signatures)), signatures)])
    order = rng.sample(range(len(signatures)), len(signatures))
    keys = {number: rng.randrange(10**6) * 1000 + number for number in order}
    parts = [order[part::shards] for part in range(shards)]
    mixed = groups_of([([keys[number] for number in part], signatures[part]) for part in parts])
    assert mixed == {frozenset(keys[number] for number in group) for group in plain}


def test_a_chain_is_one_group() -> None:
    tokens = [f"t{number}" for number in range(1000)]
    texts = [" ".join(tokens[start : start + 600]) for start in (0, 80, 160, 240, 500)]
    assert jaccard(texts[0], texts[1]) > 0.72 > 0.5 > jaccard(texts[0], texts[3])
    assert groups_of([(range(5), near.signatures(texts))]) == {frozenset({0, 1, 2, 3})}


def test_a_crowd_in_every_band_is_grouped_without_comparing_all_pairs() -> None:
    alike = family(3000, 0.9)
    boilerplate = family(3000, 0.5, seed=1)
    copies = np.repeat(family(1, 1.0, seed=2), 3000, axis=0)
    signatures = np.concatenate([alike, boilerplate, copies])
    found = groups_of([(range(9000), signatures)])
    assert found == {frozenset(range(3000)), frozenset(range(6000, 9000))}


def test_texts_without_words_are_in_no_group() -> None:
    texts = ["", "", "{}", "{}", "a b c d e f", "a, b, c, d, e, f"]
    assert groups_of([(range(4), near.signatures(texts[:4])), ((4, 5), near.signatures(texts[4:]))]) == {
        frozenset({4, 5})
    }
    assert groups_of([(range(4), near.signatures(texts[:4]))]) == groups_of([]) == set()


def test_what_is_alike_is_found_and_what_is_not_is_not() -> None:
    rng = random.Random(3)
    texts: list[str] = []
    for _ in range(60):
        tokens = code(rng, rng.choice((30, 100, 400, 2000)))
        texts += [" ".join(changed(tokens, share, rng)) for share in (0, rng.uniform(0, 0.1), rng.uniform(0, 0.1))]
    found = {key: group for group in groups_of([(range(len(texts)), near.signatures(texts))]) for key in group}
    for a in range(len(texts)):
        for b in range(a):
            alike = jaccard(texts[a], texts[b]) if a // 3 == b // 3 else 0.0
            if alike >= 0.8:
                assert b in found.get(a, ()), alike
            if a // 3 != b // 3:
                assert b not in found.get(a, ())


def test_only_copies_reach_a_threshold_of_one() -> None:
    signatures = np.concatenate([family(2, 1.0), family(5, 0.95, seed=1)])
    assert groups_of([(range(7), signatures)], threshold=1.0) == {frozenset({0, 1})}


def test_similarities_to_a_survivor(tmp_path: Path) -> None:
    signatures = family(20, 0.8)
    paths = write(tmp_path, [((9, 3, 500), signatures[:3]), (range(10, 27), signatures[3:])])
    with near_groups.opened(paths, tmp_path) as search:
        pairs = [(3, 500), (500, 26), (9, 9)]
        expected = near.similarity(signatures[[1, 2, 0]], signatures[[2, 19, 0]])
        assert search.similarities(pairs).tolist() == expected.tolist()
        assert search.similarities([]).tolist() == []
        links = list(search.links())
        assert {key for link in links for key in link[:2]} == {key for key, _ in search.groups()}
        for a, b, similarity in links:
            assert similarity == search.similarities([(a, b)])[0] >= 0.72
        with pytest.raises(LookupError):
            search.similarities([(3, 4)])
