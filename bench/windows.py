"""What editors that cut the file themselves leave of the KV cache: ``python -m bench.windows``.

A file of the standard library is typed on from its middle, key by key, as llama.vscode sends it: the 256 lines above
the cursor, which begin one line later with every new line. Counted are the tokens of each prompt that the one before
did not begin with, in blocks as the cache has them: those are computed anew. Nothing is generated.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

from bench.figures import percentile, row
from services.core.models import catalogue, prompts, weights
from services.gateway.api.window import steady

FILE, WINDOW, TYPED = "argparse.py", 256, 60
BUDGET, BLOCK = 1024, 16
"""Tokens of a prompt, and of a block of the cache."""


def main() -> None:
    tokenizer = weights.load_tokenizer(weights.ensure_weights(catalogue.find(""), Path.home() / ".cache" / "codegraft"))
    lines = (Path(sysconfig.get_paths()["stdlib"]) / FILE).read_text().splitlines(keepends=True)
    ways: dict[str, Callable[[int], str]] = {
        "the whole file": lambda at: "".join(lines[:at]),
        "256 lines": lambda at: "".join(lines[at - WINDOW : at]),
        "256 lines, steady": lambda at: steady("".join(lines[at - WINDOW : at])),
    }
    fmt = prompts.detect(tokenizer)
    for name, above in ways.items():
        before, fresh, anew, sizes = list[int](), list[int](), list[int](), list[int]()
        for at in range(600, 600 + TYPED):
            typed = lines[at].rstrip("\n")
            for column in sorted({0, len(typed) // 2, len(typed)}):
                prefix = above(at) + typed[:column]
                prompt = prompts.completion_prompt(fmt, tokenizer, path="a.py", prefix=prefix, suffix="", budget=BUDGET)
                same = next((n for n, (a, b) in enumerate(zip(before, prompt.ids, strict=False)) if a != b), None)
                shared = min(len(before), len(prompt.ids)) if same is None else same
                (fresh if column == 0 else anew).append(len(prompt.ids) - shared // BLOCK * BLOCK)
                before = prompt.ids
                sizes.append(len(prompt.ids))
        row(f"{name}: tokens of a prompt", f"{sum(sizes) / len(sizes):.0f}")
        first = [float(count) for count in fresh[1:]]
        row("  computed anew on a new line", f"mean {sum(first) / len(first):.0f}, p50 {percentile(first, 0.5):.0f}")
        row("  computed anew within a line", f"mean {sum(anew) / len(anew):.0f}")


if __name__ == "__main__":
    main()
