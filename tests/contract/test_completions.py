"""Completions, chats, scores of the whole service: real gRPC and engine over a tiny model, NATS and store faked."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import torch
from grpc_status import rpc_status
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from codegraft.inference.v1 import completion_pb2 as pb
from services.core import errors
from services.core.models import prompts
from services.inference.engine.scheduler import Limits
from tests.contract.inference_world import (
    PROJECT,
    RUN,
    Stream,
    World,
    in_time,
    refused,
    refused_call,
    until,
)

pytest_plugins = ["tests.contract.inference_fixtures"]


async def test_a_stream_is_started_deltas_finished(world: World) -> None:
    stream = await world.complete().end()
    assert stream.started.model == "tiny" and stream.started.adapter_sha256 == "" == stream.started.checkpoint
    assert stream.started.completion_id and stream.started.prompt_tokens == len("\x00a.py\ndef main():")
    assert stream.reason == "LENGTH" and stream.finished.usage.completion_tokens == 24
    assert stream.finished.usage.prompt_tokens == stream.started.prompt_tokens
    timings = stream.finished.timings
    assert 0 <= timings.first_token_seconds <= timings.total_seconds < 20
    again = await world.complete().end()
    assert again.text == stream.text and (stream.started.cached_tokens, again.started.cached_tokens) == (0, 16)


async def test_an_unsaved_file_is_of_its_language(world: World) -> None:
    def tokens(**fields: Any) -> Any:
        return world.complete(prompt=pb.CodePrompt(prefix="x = y\n", **fields), max_tokens=2).end()

    named = (await tokens(path="untitled.py")).started.prompt_tokens
    assert (await tokens(language="Python")).started.prompt_tokens == named
    assert (await tokens(path="a.py", language="Go")).started.prompt_tokens == named - len("untitled") + 1
    unknown = (await tokens(language="Klingon")).started.prompt_tokens
    assert unknown == (await tokens()).started.prompt_tokens < named


async def test_stop_rules_and_sampling(world: World) -> None:
    whole = (await world.complete(max_tokens=60).end()).text
    needle = whole[20:23]
    stopped = await world.complete(stop=pb.StopRule(max_tokens=60, strings=[needle])).end()
    assert stopped.text == whole[: whole.index(needle)] and stopped.reason == "STOP"
    sampling = pb.Sampling(temperature=1.2, top_p=0.9, repetition_penalty=1.1, seed=5)
    one, two = [(await world.complete(sampling=sampling).end()).text for _ in range(2)]
    assert one == two != whole[: len(one)]


async def test_a_single_line_ends_where_the_line_does(world: World) -> None:
    async def sampled(seed: int, **rule: Any) -> Stream:
        sampling = pb.Sampling(temperature=2.0, seed=seed)
        return await world.complete(sampling=sampling, stop=pb.StopRule(max_tokens=200, **rule)).end()

    for seed in range(20):  # a byte of a random model is seldom a newline
        whole = await sampled(seed)
        line = re.match(r"\s*[^\n]*", whole.text)[0]  # type: ignore[index]
        if whole.text[len(line) + 1 :]:
            break
    assert whole.text[len(line) + 1 :] and whole.reason != "STOP", "without the rule it goes on behind the line"
    stopped = await sampled(seed, single_line=True)
    assert (stopped.text, stopped.reason) == (line, "STOP")
    assert stopped.finished.usage.completion_tokens < whole.finished.usage.completion_tokens


async def test_code_of_other_files_stands_before_the_file(
    world: World, reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    near, far = [pb.ContextChunk(path=f"{name}.py", text=f"{name} = 1\n") for name in ("near", "far")]
    large = pb.ContextChunk(path="large.py", text="x" * 100)  # it has room alone: a stride, 128 tokens, is left

    def code(*context: pb.ContextChunk) -> pb.CodePrompt:
        return pb.CodePrompt(path="a.py", prefix="def main():\n", context=context)

    alone, one, both = [await world.complete(prompt=code(*context)).end() for context in ((), (near,), (near, far))]
    of_near, of_far = len("\x00near.py\nnear = 1\n"), len("\x00far.py\nfar = 1\n")
    assert one.started.prompt_tokens == alone.started.prompt_tokens + of_near
    assert both.started.prompt_tokens == one.started.prompt_tokens + of_far
    assert len({alone.text, one.text, both.text}) == 3
    without = await world.complete(prompt=code(near, large)).end()
    assert without.started.prompt_tokens == one.started.prompt_tokens and without.text == one.text, "it has no room"
    # The most useful stands nearest: what a score is computed behind is known to the token.
    marker: Any = tokenizer.convert_tokens_to_ids("<file_sep>")
    continuation = "    pass\n"
    ids = list[int]()
    for file in ("far.py\nfar = 1\n", "near.py\nnear = 1\n", "a.py\ndef main():\n" + continuation):
        ids += [marker, *tokenizer.encode(file, add_special_tokens=False)]
    with torch.inference_mode():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[at - 1, ids[at]]) for at in range(len(ids) - len(continuation), len(ids))]
    scored = await world.completions.Score(
        pb.ScoreRequest(parent=PROJECT, prompt=code(near, far), continuation=continuation)
    )
    assert [token.logprob for token in scored.tokens] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "error", "at"),
    [
        ({"prompt": pb.CodePrompt(path="a.py")}, errors.EmptyPrompt, "prompt"),
        ({"parent": "demo"}, errors.InvalidName, "parent"),
        ({"parent": "projects/none"}, errors.ProjectNotFound, "parent"),
        ({"stop": pb.StopRule(max_tokens=0)}, errors.InvalidArgument, "stop.max_tokens"),
        ({"stop": pb.StopRule(strings=[""])}, errors.InvalidArgument, "stop.strings"),
        ({"sampling": pb.Sampling(temperature=-1)}, errors.InvalidArgument, "sampling.temperature"),
        ({"sampling": pb.Sampling(top_p=float("nan"))}, errors.InvalidArgument, "sampling.top_p"),
        ({"sampling": pb.Sampling(n=9)}, errors.InvalidArgument, "sampling.n"),
        ({"sampling": pb.Sampling(n=0)}, errors.InvalidArgument, "sampling.n"),
        ({"sampling": pb.Sampling(logprobs=21)}, errors.InvalidArgument, "sampling.logprobs"),
        ({"adapter": pb.AdapterChoice(checkpoint="x")}, errors.InvalidName, "adapter.checkpoint"),
        (
            {"adapter": pb.AdapterChoice(checkpoint="projects/other/runs/r/checkpoints/1")},
            errors.InvalidArgument,
            "adapter.checkpoint",
        ),
        ({"adapter": pb.AdapterChoice(checkpoint=f"{RUN}/checkpoints/404")}, errors.CheckpointNotFound, "checkpoint"),
        ({"stop": pb.StopRule(max_tokens=500)}, errors.PromptTooLong, "prompt.path"),
    ],
)
async def test_bad_requests_name_the_field(world: World, fields: Any, error: type, at: str) -> None:
    answer = await refused(world.complete(**fields))
    assert type(answer) is error and answer.field == at and str(answer)


async def test_deadline_gives_the_text_so_far(world: World) -> None:
    whole = await world.complete(max_tokens=220).end()

    async def attempt(seconds: float) -> bool:
        stream = world.complete(max_tokens=220, timeout=seconds)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stream.end()
        if stream.finished is None or not stream.text:
            return False
        assert stream.reason == "DEADLINE" and 0 < stream.finished.usage.completion_tokens < 220
        assert whole.text.startswith(stream.text)
        return True

    with world.unhurried(0.03):  # the time runs out long before the text
        await in_time(attempt)


async def test_a_caller_that_goes_away_frees_its_place(world: World) -> None:
    with world.unhurried():
        stream = await world.complete(max_tokens=220).begin()
        stream.call.cancel()
        engine = world.replica.model.result().engine
        await until(lambda: engine.load == (0, 0) and world.replica.registry.streams(PROJECT) == {}, seconds=8)


NOWHERE = pb.AdapterChoice(checkpoint=f"{RUN}/checkpoints/404")
"""Whoever is refused before any work on the prompt is not told that it is not there."""


@contextlib.asynccontextmanager
async def one_that_waits(world: World) -> AsyncIterator[None]:
    """Meanwhile the only place is taken and one completion waits; in the end both are whole."""
    engine = world.replica.model.result().engine
    with world.unhurried():
        running = await world.complete(max_tokens=220).begin()
        waiting = asyncio.create_task(world.complete(max_tokens=2).end())
        await until(lambda: engine.load == (1, 1))
        yield
    assert (await waiting).reason == (await running.end()).reason == "LENGTH"


async def test_a_full_queue_refuses_with_a_time_to_come_back(worlds: Callable[..., Any]) -> None:
    world = await worlds(limits=Limits(running=1, waiting=1, step_tokens=32, kv_tokens=8192))
    code = pb.CodePrompt(path="a.py", prefix="x")
    scoring = pb.ScoreRequest(parent=PROJECT, prompt=code, continuation="y", adapter=NOWHERE)
    async with one_that_waits(world):
        answer = await refused(world.complete(max_tokens=2))
        others = [await refused(world.complete(adapter=NOWHERE)), await refused_call(world.completions.Score(scoring))]
    assert type(answer) is errors.QueueFull and answer.retry_after
    assert [type(other) for other in others] == [errors.QueueFull, errors.QueueFull]


async def test_several_of_one_prompt_are_refused_together(worlds: Callable[..., Any]) -> None:
    world = await worlds(limits=Limits(running=1, waiting=3, step_tokens=32, kv_tokens=8192))
    async with one_that_waits(world):
        three = await refused(world.complete(sampling=pb.Sampling(n=3), adapter=NOWHERE))
        two = await refused(world.complete(sampling=pb.Sampling(n=2), adapter=NOWHERE))
    assert (type(three), type(two)) == (errors.QueueFull, errors.CheckpointNotFound)


async def test_a_project_that_fills_its_part_of_the_queue_leaves_room_for_others(worlds: Callable[..., Any]) -> None:
    limits = Limits(running=1, waiting=4, project_waiting=1, step_tokens=32, kv_tokens=8192)
    world = await worlds(limits=limits)
    engine = world.replica.model.result().engine
    async with one_that_waits(world):
        answer = await refused(world.complete(max_tokens=2))
        assert type(answer) is errors.QueueFull and PROJECT in answer.message
        other = asyncio.create_task(world.complete(max_tokens=2, parent="projects/other").end())
        await until(lambda: engine.load == (1, 2))
    assert (await other).reason == "LENGTH"


async def test_completions_wait_for_the_model_or_say_that_it_loads(worlds: Callable[..., Any]) -> None:
    hold = threading.Event()
    world = await worlds(hold=hold, inference_load_wait_seconds=0.2)
    models = await world.completions.ListModels(pb.ListModelsRequest())
    assert [model.cached for model in models.models] == [False]
    answer = await refused(world.complete())
    assert type(answer) is errors.ModelLoading and answer.retry_after
    assert not (await world.status()).status.ready
    hold.set()
    await asyncio.wait_for(asyncio.shield(world.replica.model), 20)
    assert (await world.complete().end()).reason == "LENGTH" and (await world.status()).status.ready


async def test_chat_needs_a_template_and_renders_with_it(world: World) -> None:
    message = pb.ChatMessage(role=pb.CHAT_ROLE_USER, content="<|endoftext|>hi")
    request = pb.ChatRequest(parent=PROJECT, messages=[message], stop=pb.StopRule(max_tokens=3))
    answer = await refused(Stream(world.completions.Chat(request, timeout=10)))
    assert type(answer) is errors.ChatUnsupported
    tokenizer = world.replica.model.result().tokenizer
    tokenizer.chat_template = "{% for m in messages %}<file_sep>{{ m.role }}:{{ m.content }}{% endfor %}"
    try:
        stream = await Stream(world.completions.Chat(request, timeout=10)).end()
        best = await world.store(1, seed=1)
        await world.publish(best)
        await world.until_active(best.sha256)
        tuned = await Stream(world.completions.Chat(request, timeout=10)).end()
    finally:
        tokenizer.chat_template = None
    assert stream.started.prompt_tokens == 1 + len("user:<|endoftext|>hi"), "markers in a message are only text"
    assert stream.reason == tuned.reason == "LENGTH" and tuned.text != stream.text
    assert (stream.started.adapter_sha256, tuned.started.adapter_sha256) == ("", best.sha256)


async def test_several_completions_of_one_prompt(world: World) -> None:
    def sampling(**fields: Any) -> pb.Sampling:
        return pb.Sampling(temperature=1.0, logprobs=2, **fields)

    request = pb.CompleteRequest(
        parent=PROJECT,
        prompt=pb.CodePrompt(path="a.py", prefix="def main():\n" * 4),
        stop=pb.StopRule(max_tokens=20),
        sampling=sampling(seed=5, n=3),
        session="s",
    )
    texts, spelled, ends, started = ["", "", ""], [b"", b"", b""], dict[int, int](), 0
    async for response in world.completions.Complete(request, timeout=20):
        match response.WhichOneof("part"):
            case "started":
                started += 1
            case "delta":
                delta = response.delta
                texts[delta.index] += delta.text
                assert len(delta.logprobs) == delta.tokens and all(item.logprob <= 0 for item in delta.logprobs)
                spelled[delta.index] += b"".join(item.text for item in delta.logprobs)
                assert all(len(item.top) == 2 and item.top[0].logprob >= item.logprob for item in delta.logprobs)
            case "finished":
                assert response.finished.index not in ends
                ends[response.finished.index] = response.finished.usage.completion_tokens
    assert started == 1 and sorted(ends) == [0, 1, 2]
    assert len(set(texts)) == 3
    # The last character may be half there: of a text it is not told.
    assert [codecs.getincrementaldecoder("utf-8")("replace").decode(data) for data in spelled] == texts
    for index, text in enumerate(texts):
        alone = await world.complete("def main():\n" * 4, 20, sampling=sampling(seed=5 + index)).end()
        assert alone.text == text and alone.finished.usage.completion_tokens == ends[index]


async def test_one_of_several_that_cannot_begin_in_time_ends_with_the_others(worlds: Callable[..., Any]) -> None:
    world = await worlds(limits=Limits(running=1, waiting=4, step_tokens=32, kv_tokens=8192))

    async def attempt(seconds: float) -> bool:
        ends = {}
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for response in world.complete(max_tokens=220, sampling=pb.Sampling(n=8), timeout=seconds).call:
                if response.WhichOneof("part") == "finished":
                    ends[response.finished.index] = response.finished
        if len(ends) < 8 or not ends[0].usage.completion_tokens:
            return False
        assert sorted(ends) == list(range(8)) and ends[7].reason == pb.FINISH_REASON_DEADLINE
        assert ends[7].usage.completion_tokens == 0
        return True

    with world.unhurried(0.03):  # the time runs out long before the text
        await in_time(attempt)


async def test_score_is_of_the_document_as_it_is_trained_on(
    world: World, reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prefix, continuation = "x = 1\ny = ", "é + x\n"
    fmt = world.replica.model.result().format
    ids = prompts.training_document(fmt, tokenizer, path="a.py", text=prefix + continuation, is_end=False)
    with torch.inference_mode():
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    count = len(continuation.encode())
    expected = [float(logprobs[at - 1, ids[at]]) for at in range(len(ids) - count, len(ids))]
    code = pb.CodePrompt(path="a.py", prefix=prefix)
    request = pb.ScoreRequest(parent=PROJECT, prompt=code, continuation=continuation)
    scored = await world.completions.Score(request)
    assert (scored.model, scored.adapter_sha256) == ("tiny", "")
    assert b"".join(token.text for token in scored.tokens).decode() == continuation
    assert [token.logprob for token in scored.tokens] == pytest.approx(expected, abs=1e-3)
    best = await world.store(1, seed=1)
    request.adapter.checkpoint = best.checkpoint
    other = await world.completions.Score(request)
    assert other.adapter_sha256 == best.sha256 and other.tokens[0].logprob != scored.tokens[0].logprob


async def test_score_refuses_what_it_cannot_score(world: World) -> None:
    def request(**fields: Any) -> pb.ScoreRequest:
        code = pb.CodePrompt(path="a.py", prefix="x")
        return pb.ScoreRequest(**{"parent": PROJECT, "prompt": code, "continuation": "y", **fields})

    for fields, error, at in (
        ({"prompt": pb.CodePrompt(path="a.py")}, errors.EmptyPrompt, "prompt"),
        ({"continuation": ""}, errors.InvalidArgument, "continuation"),
        ({"continuation": "y" * 400}, errors.PromptTooLong, "continuation"),
        ({"parent": "projects/none"}, errors.ProjectNotFound, "parent"),
    ):
        answer = await refused_call(world.completions.Score(request(**fields)))
        assert type(answer) is error and answer.field == at
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.completions.Score(request(continuation="y" * 200), timeout=1e-4)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_project_does_not_see_what_another_one_has_sent(world: World) -> None:
    best = await world.store(1, seed=1)
    sent = "secret = 'of one project only'\n" * 2
    one, other = PROJECT, "projects/other"
    for adapter in (pb.AdapterChoice(base=True), pb.AdapterChoice(checkpoint=best.checkpoint)):
        first = await world.complete(sent, adapter=adapter).end()
        again = await world.complete(sent, adapter=adapter).end()
        assert (first.started.cached_tokens, again.started.cached_tokens) == (0, 64) and first.text == again.text
    for expected in (0, 64):  # nor is anything lost within a project
        stream = await world.complete(sent, parent=other, adapter=pb.AdapterChoice(base=True)).end()
        assert stream.started.cached_tokens == expected
    imported = await world.store(1, seed=1, run=f"{other}/runs/r")  # the very same adapter
    assert imported.sha256 == best.sha256 and one != other
    stream = await world.complete(sent, parent=other, adapter=pb.AdapterChoice(checkpoint=imported.checkpoint)).end()
    assert stream.started.adapter_sha256 == best.sha256 and stream.started.cached_tokens == 0


async def test_every_error_carries_its_details(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.complete(prompt=pb.CodePrompt()).end()
    status = rpc_status.from_call(caught.value)
    assert status is not None and caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
