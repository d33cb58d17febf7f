"""vLLM over one model, in its own environment: ``python bench/vllm_process.py FOLDER STREAMS TOKENS``.

Says one line when it has written a token, then answers each line of standard input, ``[prompts, tokens]`` in JSON, with
the seconds that all of them took together. What vLLM says goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO


def main(answers: TextIO) -> None:
    from vllm import LLM, SamplingParams

    folder, streams, longest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llm = LLM(
        model=folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=streams,
        enable_prefix_caching=False,
    )

    def complete(prompts: list[list[int]], tokens: int) -> float:
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        given = llm.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(one.outputs[0].token_ids) == tokens for one in given), given
        return seconds

    print(json.dumps(complete([[1, 2, 3]], 1)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(complete(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(own)
