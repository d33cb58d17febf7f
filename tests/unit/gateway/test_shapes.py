"""How answers are written, and which version a model's name means."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from codegraft.inference.v1 import completion_pb2 as pb
from services.client import Piece
from services.client.streams import AsyncStream
from services.core.errors import CodegraftError, InvalidArgument, ModelNotFound
from services.gateway.api.generation import Generation, Part
from services.gateway.api.models import ModelNames
from services.gateway.api.text import TextShape, spelled


def generation() -> Generation:
    stream: AsyncStream[Piece] = AsyncStream.__new__(AsyncStream)
    stream._call = type("Call", (), {"cancel": lambda self: None})()
    return Generation(stream, pb.Started(completion_id="c", model="m", adapter_sha256="ab", prompt_tokens=3))


def token(text: bytes) -> pb.TokenLogprob:
    return pb.TokenLogprob(text=text, logprob=-0.5, top=[pb.TopLogprob(text=text, logprob=-0.5)])


def test_tokens_of_half_a_character_are_spelled_and_placed() -> None:
    shape = TextShape(generation(), "demo", 0, with_logprobs=True)
    part = Part(0)
    pieces = [Piece("a", tokens=1, logprobs=(token(b"a"),)), Piece("é!", tokens=3)]
    pieces[1] = Piece("é!", tokens=3, logprobs=(token(b"\xc3"), token(b"\xa9"), token(b"!")))
    offsets = []
    for piece in pieces:
        part.take(piece)
        (chunk,) = shape.chunks(piece, part)
        known = chunk.choices[0].logprobs
        assert known is not None
        offsets += known.text_offset
    (whole,) = shape.whole([part]).choices
    assert whole.text == "aé!" and whole.logprobs and whole.logprobs.text_offset == offsets == [0, 1, 1, 2]
    assert whole.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "!"] and spelled("é".encode()) == "é"
    assert orjson.loads(orjson.dumps(shape.whole([part])))["system_fingerprint"] == "m+ab"


def test_blanks_that_the_prompt_ends_with_are_in_the_first_token_and_not_in_the_text() -> None:
    shape, part = TextShape(generation(), "demo", 0, with_logprobs=True), Part(0)
    part.take(Piece("if n", tokens=3, logprobs=(token(b"  if"), token(b" "), token(b"n"))))
    known = shape.whole([part]).choices[0].logprobs
    assert known and known.text_offset == [0, 2, 3]


class Services:
    """As much of the client as names ask for."""

    def __init__(self, *projects: str) -> None:
        self.completions = self.projects = self
        self._projects, self.asked = projects, 0

    async def models(self) -> Any:
        self.asked += 1
        yield type("Model", (), {"id": "base-1"})

    async def list(self, page_size: int) -> Any:
        for name in self._projects:
            yield type("Project", (), {"name": f"projects/{name}"})


@pytest.mark.parametrize(
    ("model", "project", "wanted"),
    [
        ("acme", "", ("acme", pb.AdapterChoice())),
        ("acme@base", "", ("acme", pb.AdapterChoice(base=True))),
        ("acme@r-1/20", "", ("acme", pb.AdapterChoice(checkpoint="projects/acme/runs/r-1/checkpoints/20"))),
        ("", "acme", ("acme", pb.AdapterChoice())),
        ("", "", ("only", pb.AdapterChoice())),
        ("base-1", "acme", ("acme", pb.AdapterChoice(base=True))),
        ("base-1", "", ("only", pb.AdapterChoice(base=True))),
        ("acme", "other", InvalidArgument),
        ("Acme!", "", ModelNotFound),
        ("acme@", "", ModelNotFound),
        ("acme@best", "", ModelNotFound),
        ("acme@r/1/2", "", ModelNotFound),
        ("", "../x", ModelNotFound),
    ],
)
async def test_names_of_models(model: str, project: str, wanted: Any) -> None:
    names = ModelNames(Services("only"))  # type: ignore[arg-type]
    if isinstance(wanted, tuple):
        target = await names.target(model, project)
        assert (target.project, target.adapter) == wanted
        return
    with pytest.raises(CodegraftError) as caught:
        await names.target(model, project)
    assert type(caught.value) is wanted and caught.value.field == "model" and caught.value.hint


async def test_several_projects_have_to_be_told_apart() -> None:
    services = Services("one", "two")
    names = ModelNames(services)  # type: ignore[arg-type]
    for model in ("", "base-1", "base-1"):
        with pytest.raises(InvalidArgument):
            await names.target(model, "")
    assert services.asked == 1, "the base model's name is remembered"
