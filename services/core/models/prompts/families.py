"""The published prompt formats of models trained to fill in the middle.

| family     | models                                    | published in                                            |
|------------|-------------------------------------------|---------------------------------------------------------|
| codegemma  | CodeGemma 2B, 7B                          | model card                                              |
| qwen       | Qwen2.5-Coder, Qwen3-Coder, Granite 3, 4  | README of Qwen2.5-Coder, repository level               |
| codeqwen   | CodeQwen1.5                               | README of CodeQwen1.5                                   |
| starcoder2 | StarCoder2                                | arXiv:2402.19173, section 5.3                           |
| starcoder  | StarCoder, granite-code, Refact, StableCode | arXiv:2305.06161, section 5.1; model cards            |
| deepseek   | DeepSeek-Coder, -V2, V3                   | README of DeepSeek-Coder                                |
| codellama  | CodeLlama 7B, 13B                         | arXiv:2308.12950, section 2.3                           |
| codestral  | Codestral                                 | mistral-common, InstructTokenizerV2.encode_fim          |
| seedcoder  | Seed-Coder                                | README of Seed-Coder                                    |

A model is told by its vocabulary alone; names lie (fine-tuned, renamed, local folders). The first family whose markers
are all there is the one, so what tells two apart stands in ``needs``.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.core.models.prompts.formats import PathPlace, Style


@dataclass(frozen=True, slots=True)
class Family:
    """Markers that go together."""

    name: str
    style: Style
    prefix: str
    suffix: str
    middle: str
    """Empty where the prefix itself is continued."""
    needs: tuple[str, ...] = ()
    """Further markers of its vocabulary."""
    path_place: PathPlace = "before"
    path_text: str = "# {path}\n"
    """The path's line where the vocabulary has no marker for it."""
    end_of_middle: str = ""
    """Empty where a middle ends as a document does."""

    @property
    def markers(self) -> tuple[str, ...]:
        """The markers around prefix, suffix and middle."""
        return tuple(marker for marker in (self.prefix, self.suffix, self.middle) if marker)


FAMILIES = (
    Family(
        *("codegemma", "psm", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        needs=("<|file_separator|>",),
        end_of_middle="<|file_separator|>",
    ),
    Family("qwen", "psm", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    Family("codeqwen", "psm", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", needs=("<reponame>", "<file_sep>")),
    Family(
        *("starcoder2", "psm", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        needs=("<file_sep>",),
        path_place="around",
    ),
    Family("starcoder", "psm", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", path_place="inside"),
    Family("deepseek", "psm", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", path_text="#{path}\n"),  # noqa: RUF001
    Family("codellama", "psm", "▁<PRE>", "▁<SUF>", "▁<MID>", end_of_middle="▁<EOT>"),
    Family("codestral", "spm", "[PREFIX]", "[SUFFIX]", ""),
    Family("seedcoder", "spm", "<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"),
)

PATH_MARKERS = ("<|file_sep|>", "<file_sep>", "<|filename|>", "<filename>")
END_MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>")  # noqa: RUF001
STOP_MARKERS = (
    *END_MARKERS,
    *PATH_MARKERS,
    *("<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<repo_name>", "<|reponame|>", "<reponame>", "<|EOT|>", "▁<EOT>"),
    *("<|file_separator|>", "[MIDDLE]"),
    # A turn of a chat, which not every tokenizer calls its end of text: Qwen and SmolLM2, Gemma, Llama 3.
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|eot_id|>"),
    *(marker for family in FAMILIES for marker in family.markers),
)
