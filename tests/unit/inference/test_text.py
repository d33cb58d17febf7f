"""Text from tokens: whole characters, stops across borders, the overhang; and which tokens spell a text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from services.core.models.spelling import Overhang, Spelling, token_bytes, within
from services.inference.engine.text import TextStream, suffix_stop

BYTES = [bytes([byte]) for byte in range(256)]


def spell(stream: TextStream, text: str) -> list[str]:
    """Pushes the text byte by byte until it stops; what each push gave, and the rest."""
    given_out = []
    for byte in text.encode():
        given_out.append(stream.push(byte))
        if stream.stopped:
            break
    return [*given_out, stream.flush()]


def test_characters_come_whole() -> None:
    assert [part for part in spell(TextStream(BYTES), "aé☺b") if part] == ["a", "é", "☺", "b"]


def test_a_cut_character_is_dropped_at_the_end() -> None:
    stream = TextStream(BYTES)
    assert stream.push("☺".encode()[0]) == "" and stream.flush() == ""


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_output_is_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(BYTES, stop=stops)
    out = "".join(spell(stream, text))
    # The stop that is complete first wins; of several, the one that begins first.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    expected = min((text[: ends[0]].find(s) for s in stops if s in text[: ends[0]]), default=0) if ends else len(text)
    assert out == text[:expected] and stream.stopped == bool(ends)


def test_what_may_become_a_stop_is_held_back() -> None:
    stream = TextStream(BYTES, stop=["END"])
    assert [stream.push(byte) for byte in b"xENxEN"] == ["x", "", "", "ENx", "", ""]
    assert stream.flush() == "EN"


@pytest.mark.parametrize(
    ("text", "line"),
    [("return 1\nmore", "return 1"), ("\n\n  return 1\nmore", "\n\n  return 1"), ("\n \n", "\n \n"), ("one", "one")],
)
def test_single_line_ends_at_the_first_line_with_text(text: str, line: str) -> None:
    stream = TextStream(BYTES, single_line=True)
    assert "".join(spell(stream, text)) == line
    assert stream.stopped == (line != text)


def test_overhang_is_not_output() -> None:
    vocabulary = [*BYTES, b"\n    return"]
    overhang = Overhang.of("\n  ", b"\n  ", vocabulary)
    stream = TextStream(vocabulary, overhang=overhang)
    assert stream.push(ord("\n")) == "" and stream.repeating and stream.overhang == Overhang(b"  ", (32, 32))
    assert stream.push(ord(" ")) == "" and stream.repeating and stream.overhang == Overhang(b" ", (32,))
    assert stream.push(ord(" ")) == "" and stream.repeating and stream.overhang == Overhang()
    stream = TextStream(vocabulary, overhang=overhang)
    assert stream.push(256) == "  return" and not stream.repeating and stream.overhang == Overhang()
    stream = TextStream(vocabulary, overhang=overhang)
    assert stream.push(ord("x")) == "x" and not stream.repeating and stream.overhang == Overhang(), "cannot be spelled"


def test_an_overhang_that_is_spelled_otherwise_may_go_on_as_it_likes() -> None:
    vocabulary = [b" ", b"  ", b"   ", b"     x"]
    spelling, overhang = Spelling(vocabulary), Overhang.of("     ", (2, 1), vocabulary)
    assert sorted(spelling.beginning(overhang)) == [2, 3]
    followed, new = overhang.after(2, vocabulary[2])
    assert followed == Overhang(b"  ", (1,)) and not new and sorted(spelling.beginning(followed)) == [1, 2, 3]
    otherwise, new = overhang.after(0, vocabulary[0])
    assert otherwise == Overhang(b"    ") and not new and sorted(spelling.beginning(otherwise)) == [0, 1, 2, 3]
    assert overhang.after(3, vocabulary[3]) == (Overhang(), b"x") and not spelling.beginning(Overhang())


@pytest.mark.parametrize(
    ("suffix", "text", "kept"),
    [
        ("\n    return x\n", "    x = 1\n    return x\nmore", "    x = 1"),
        ("\n\n    return x\n", "    x = 1\n    return x", "    x = 1"),
        ("\n    return x\n", "    x = 1\n    return xy\n", "    x = 1\n    return xy\n"),
        (")\nnext", "foo(a), b)\nnext", "foo(a), b"),
        ("", "anything\n", "anything\n"),
    ],
)
def test_a_suffix_that_the_model_does_not_see_ends_the_text(suffix: str, text: str, kept: str) -> None:
    assert "".join(spell(TextStream(BYTES, suffix_stop=suffix_stop(suffix)), text)) == kept


def test_vocabularies_of_words_and_of_sentence_piece() -> None:
    words = Tokenizer(models.WordLevel({"def": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    assert token_bytes(plain) == [b"def", b"", b""]
    pieces = Tokenizer(models.WordLevel({"▁def": 0, "<0x0A>": 1, "x": 2}, unk_token="x"))
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=pieces)) == [b" def", b"\n", b"x"]


PARTS = st.one_of(st.binary(max_size=3), st.text(" \n", max_size=3).map(str.encode))


@given(st.lists(PARTS, max_size=20), PARTS.filter(bool))
def test_spelling_finds_exactly_the_tokens_that_agree(vocabulary: list[bytes], text: bytes) -> None:
    expected = [n for n, data in enumerate(vocabulary) if data and (data.startswith(text) or text.startswith(data))]
    assert sorted(Spelling(vocabulary).beginning(Overhang(text))) == expected
    for first in range(len(vocabulary)):
        bound = [n for n in expected if not text.isspace() or n == first or vocabulary[n].startswith(text)]
        assert sorted(Spelling(vocabulary).beginning(Overhang(text, (first,)))) == bound


def test_ids_within_a_text() -> None:
    vocabulary = [b"\n\n", b"\n", b"x", b"", b"\n   ", b" x"]
    assert within(vocabulary, b"\n\n\n", [0, 1, 2]) == (0, 1)
    assert within(vocabulary, b"\n    ", [4, 5]) == (4,), "the last blank goes with the word"
    assert within(vocabulary, b"\n", [3, 1]) == within(vocabulary, b"\n", []) == ()
    assert within(vocabulary, b"\n\n", [0]) == (0,)
