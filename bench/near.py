"""Benchmarks of near-duplicates: ``python -m bench.near [speed] [accuracy] [memory]``; all when none is named."""

from __future__ import annotations

import multiprocessing
import random
import re
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rensa
from numpy.typing import NDArray

from services.scanner import near, near_groups

ROUNDS = 5
SCHEMA = pa.schema([near_groups.KEY, near_groups.SIGNATURE])
SUFFIXES = {".py", ".c", ".h", ".js", ".json", ".md"}
WORD = re.compile("[0-9A-Za-z_\x80-\U0010ffff]+")


def real_texts(count: int) -> list[str]:
    """Files of the installed packages, of all kinds in the share that they have there."""
    top = Path(sysconfig.get_paths()["purelib"])
    paths = sorted(path for path in top.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    random.Random(0).shuffle(paths)
    found: list[str] = []
    for path in paths:
        data = path.read_bytes()
        if data and len(data) <= 512 * 1024:
            try:
                found.append(data.decode())
            except UnicodeDecodeError:
                continue
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} files are installed")


def shard(path: Path, keys: Sequence[int] | NDArray[np.int64], signatures: NDArray[np.uint32]) -> None:
    column = near_groups.signature_column(signatures)
    with pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False) as writer:
        writer.write_table(pa.table([pa.array(keys, pa.int64()), column], SCHEMA), row_group_size=10_000)


def cpu(call: Callable[[], object]) -> float:
    """Seconds of processor time, of all threads."""
    began = time.process_time()
    call()
    return time.process_time() - began


def speed() -> None:
    """Real files from their texts to their groups, on one core."""
    texts = real_texts(4_000)
    size = sum(len(text.encode()) for text in texts)

    def everything() -> None:
        with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as folder:
            for start in range(0, len(texts), 1_000):
                keys = range(start, start + len(texts[start : start + 1_000]))
                shard(Path(folder, f"{start}.parquet"), keys, near.signatures(texts[start : start + 1_000]))
            with near_groups.opened(sorted(Path(folder).glob("*.parquet")), Path(folder)) as search:
                sum(1 for _ in search.groups())

    def plainly() -> None:
        """The peer: shingles in plain Python, their signatures by rensa."""
        for start in range(0, len(texts), 100):
            sets = [[" ".join(gram) for gram in shingles(text)] for text in texts[start : start + 100]]
            rensa.RMinHash.digest_matrix_from_token_sets(sets, near.ROWS, 42).to_rows()

    peers, signed, all_of_it = [], [], []
    for _ in range(ROUNDS):
        peers.append(cpu(plainly))
        signed.append(cpu(lambda: near.signatures(texts)))
        all_of_it.append(cpu(everything))
    print(f"speed: {len(texts):,} files, {size / 1e6:.1f} MB, {size / len(texts) / 1e3:.1f} kB each, {ROUNDS} rounds")
    for name, seconds in (
        ("shingles in plain Python", peers),
        ("signatures", signed),
        ("all, up to the groups", all_of_it),
    ):
        rates = [len(texts) / second for second in seconds]
        print(f"  {name:25} {statistics.median(rates):7,.0f} files/s and core ({min(rates):,.0f} to {max(rates):,.0f})")
    print("  asked: 4,000 files/s and core for all of it")


def shingles(text: str) -> set[tuple[str, ...]]:
    """What near.py means by them, word for word."""
    words = WORD.findall(text)
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))} if words else set()


def mutated(text: str, wanted: float, others: Sequence[str], rng: random.Random) -> str:
    """A copy with about that Jaccard similarity: other words all over it, or one part in another file's words."""
    lost = (1 - wanted) / (1 + wanted)
    spans = [match.span() for match in WORD.finditer(text)]
    if rng.random() < 0.5:
        chosen = {span for span in spans if rng.random() < 1 - (1 - lost) ** 0.2}
        pieces, last = [], 0
        for start, end in spans:
            if (start, end) in chosen:
                pieces += [text[last:start], f"v{rng.randrange(10**6)}"]
                last = end
        return "".join(pieces) + text[last:]
    length = round(lost * len(spans))
    first = rng.randrange(len(spans) - length + 1)
    begin, end = spans[first][0], spans[min(first + length, len(spans) - 1)][0]
    words = WORD.findall(rng.choice(others))[:length]
    return text[:begin] + " ".join(words) + "\n" + text[end:]


def family_texts(count: int) -> list[str]:
    """Real files and copies of theirs, each of them 0.45 to 1.0 like its original."""
    rng = random.Random(1)
    originals = [text for text in real_texts(count) if len(WORD.findall(text)) >= 20]
    texts: list[str] = []
    for original in originals:
        texts.append(original)
        for _ in range(rng.choice((0, 1, 2, 5))):
            texts.append(mutated(original, rng.uniform(0.45, 1.0), originals, rng))
        if len(texts) >= count:
            break
    return texts[:count]


def exact_pairs(texts: Sequence[str], least: float) -> dict[tuple[int, int], float]:
    """Brute force: the Jaccard similarity of all pairs that have that much, by an inverted index."""
    sets = [shingles(text) for text in texts]
    having: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    found: dict[tuple[int, int], float] = {}
    for number, grams in enumerate(sets):
        shared: Counter[int] = Counter()
        for gram in grams:
            shared.update(having[gram])
            having[gram].append(number)
        for other, common in shared.items():
            jaccard = common / (len(grams) + len(sets[other]) - common)
            if jaccard >= least:
                found[other, number] = jaccard
    return found


def accuracy() -> None:
    """3,000 files, a part of them changed copies of others, against the exact similarity of all pairs."""
    texts = family_texts(3_000)
    exact = exact_pairs(texts, 0.3)
    signatures = near.signatures(texts)
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as folder:
        shard(Path(folder, "all.parquet"), range(len(texts)), signatures)
        with near_groups.opened([Path(folder, "all.parquet")], Path(folder)) as search:
            links = [(min(a, b), max(a, b)) for a, b, _ in search.links()]
            group = dict(search.groups())
    a, b = np.array(list(exact)).T
    errors = near.similarity(signatures[a], signatures[b]) - list(exact.values())
    print(f"accuracy: {len(texts):,} files, {sum(value >= 0.5 for value in exact.values()):,} pairs at 0.5 and more")
    print(f"  estimates err by {np.std(errors):.3f} (standard deviation), {np.mean(errors):+.4f} on average")
    for low, high in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.75), (0.75, 0.8), (0.8, 0.85), (0.85, 1.0)):
        those = [pair for pair, value in exact.items() if low <= value < high or value == high == 1.0]
        together = sum(a in group and group[a] == group.get(b) for a, b in those) / len(those)
        print(f"  exact {low:.2f} to {high:.2f}: {len(those):6,} pairs, in one group {together:7.2%}")
    print("  asked: 98 % of the pairs at 0.85 and more")
    keys = near.bands(near.THRESHOLD).keys(signatures)
    every = [
        (a, a + 1 + int(b)) for a in range(len(texts)) for b in np.flatnonzero((keys[a] == keys[a + 1 :]).any(axis=1))
    ]
    alike = [
        (a, b) for a, b in every if near.similarity(signatures[a], signatures[b]) >= near.THRESHOLD + near_groups.MARGIN
    ]
    for name, pairs in (("links that made the groups", links), ("all that can be linked", alike)):
        right = sum(exact.get(pair, 0.0) >= near.THRESHOLD for pair in pairs) / len(pairs)
        print(f"  {name}: {len(pairs):,} pairs, exact similarity at least 0.7: {right:.2%} (asked: 95 %)")


def synthetic(count: int, rng: np.random.Generator) -> Iterator[NDArray[np.uint32]]:
    """Signatures: a twentieth near-copies of one file, some more that share half of it, families of 2 to 8, the rest
    single; the copies of a signature keep each row with the square root of the similarity they shall have."""
    shares = [(count // 20, 0.9), (count // 50, 0.55), (count // 50, 1.0)]
    families = count * 3 // 10
    while families > 0:
        shares.append((int(rng.integers(2, 9)), rng.uniform(0.4, 1.0)))
        families -= shares[-1][0]
    shares += [(10_000, 0.0)] * (count // 10_000)
    waiting: list[NDArray[np.uint32]] = []
    left = count
    for size, alike in shares:
        original = rng.integers(0, near.EMPTY, near.ROWS, np.uint32)
        for start in range(0, min(size, left), 10_000):
            part = min(size - start, 10_000, left)
            changed = rng.integers(0, near.EMPTY, (part, near.ROWS), np.uint32)
            kept = rng.random((part, near.ROWS), np.float32) < alike**0.5
            waiting.append(np.where(kept, original, changed))
            left -= part
        if sum(map(len, waiting)) >= 10_000 or not left:
            yield np.concatenate(waiting)
            waiting = []
        if not left:
            return


def grouped(folder: Path) -> tuple[int, int, float, float]:
    """Runs in a process of its own: files in groups, groups, seconds, and the highest resident memory in MB."""
    began = time.perf_counter()
    with near_groups.opened(sorted(folder.glob("*.parquet")), folder) as search:
        groups = dict(search.groups())
    seconds = time.perf_counter() - began
    # Not getrusage, whose peak begins with the parent's.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000
    return len(groups), len(set(groups.values())), seconds, peak


def memory() -> None:
    """A million signatures, grouped."""
    count = 1_000_000
    rng = np.random.default_rng(0)
    keys = rng.permutation(count)
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as folder:
        done = 0
        for number, signatures in enumerate(synthetic(count, rng)):
            shard(Path(folder, f"{number}.parquet"), keys[done : done + len(signatures)], signatures)
            done += len(signatures)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            files, groups, seconds, peak = pool.apply(grouped, (Path(folder),))
        written = sum(path.stat().st_size for path in Path(folder).iterdir() if path.suffix != ".parquet")
    print(f"memory: {done:,} synthetic signatures, {files:,} of them in {groups:,} groups")
    print(f"  {seconds:.1f} s, peak {peak:,.0f} MB (asked: 1,500 MB), {written / 1e6:,.0f} MB on disk")


if __name__ == "__main__":
    known = {"speed": speed, "accuracy": accuracy, "memory": memory}
    for name in sys.argv[1:] or known:
        known[name]()
