"""Editors' requests over HTTP, answered by a real engine; and a client that others wrote, openai."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import openai
import pytest

from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.run_pb2 import ListCheckpointsResponse, ListRunsResponse, Run
from services.client import Addresses, AsyncCodegraft
from services.core import errors
from services.core.auth.caller import Caller, Role, set_current
from services.inference import figures
from services.inference.completions import Request, Stop
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Reason
from services.inference.prompter import Code
from tests.contract.gateway_world import Gateway
from tests.contract.inference_world import PROJECT, RUN, World, in_time, until

pytest_plugins = ["tests.contract.gateway_fixtures"]

CODE: dict[str, Any] = {"model": "demo", "prompt": "def main():\n", "path": "a.py", "max_tokens": 24}
CODE_FOR_OPENAI: dict[str, Any] = {
    "model": "demo",
    "prompt": CODE["prompt"],
    "max_tokens": 24,
    "extra_body": {"path": "a.py"},
}


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def events(response: httpx2.Response) -> list[str]:
    return [line.removeprefix("data: ") async for line in response.aiter_lines() if line]


# --- completions, as openai asks for them ---


async def test_a_completion_is_what_grpc_gives(world: World, client: openai.AsyncOpenAI) -> None:
    direct = await world.complete().end()
    answer = await client.completions.create(
        model="demo", prompt="def main():\n", max_tokens=24, extra_body={"path": "a.py"}
    )
    (choice,) = answer.choices
    assert choice.text == direct.text and choice.finish_reason == "length" and choice.logprobs is None
    assert answer.object == "text_completion" and answer.model == "demo" and answer.id.startswith("cmpl-")
    assert answer.system_fingerprint == "tiny+base" and answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (direct.started.prompt_tokens, 24)


async def test_a_stream_has_the_same_text_and_ends_with_done(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(**CODE_FOR_OPENAI)
    text, last = "", None
    async for chunk in await client.completions.create(
        **CODE_FOR_OPENAI, stream=True, stream_options={"include_usage": True}
    ):
        assert chunk.system_fingerprint == "tiny+base"
        text += "".join(choice.text for choice in chunk.choices)
        last = chunk
    assert text == whole.choices[0].text
    assert last is not None and not last.choices and last.usage is not None
    assert last.usage.completion_tokens == 24
    async with gateway.http.stream("POST", "/v1/completions", json={**CODE, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-codegraft-adapter"] == "base"
        raw = await events(response)
    assert raw[-1] == "[DONE]" and json.loads(raw[-2])["choices"][0]["finish_reason"] == "length"


async def test_several_with_log_probabilities_and_a_seed(client: openai.AsyncOpenAI) -> None:
    async def ask(**fields: Any) -> Any:
        return await client.completions.create(**CODE_FOR_OPENAI, n=3, seed=5, temperature=1.0, logprobs=2, **fields)

    answer = await ask()
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert answer.usage.completion_tokens == 72
    for choice in answer.choices:
        known = choice.logprobs
        assert 23 <= len(known.tokens) == len(known.token_logprobs) == len(known.text_offset) <= 24
        assert all(len(top) <= 2 for top in known.top_logprobs) and max(known.token_logprobs) <= 0
        assert known.text_offset == sorted(known.text_offset) and known.text_offset[0] == 0
    streamed = ["", "", ""]
    offsets: list[list[int]] = [[], [], []]
    async for chunk in await ask(stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert streamed == texts and offsets == [choice.logprobs.text_offset for choice in answer.choices]


async def test_stop_strings_and_a_suffix(world: World, gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    whole = (await client.completions.create(**CODE_FOR_OPENAI)).choices[0].text
    needle = whole[10:13]
    stopped = (await client.completions.create(**CODE_FOR_OPENAI, stop=needle)).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(needle)], "stop")
    code = pb.CodePrompt(path="a.py", prefix=CODE["prompt"], suffix=whole[10:])
    direct = await world.complete(prompt=code).end()
    filled = await gateway.post("/v1/completions", {**CODE, "suffix": whole[10:]})
    assert filled.json()["choices"][0]["text"] == direct.text != whole, "the suffix says where it ends"


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"prompt": ""}, 400, "EMPTY_PROMPT", "prompt"),
    ({"prompt": ["a", "b"]}, 400, "INVALID_ARGUMENT", "prompt"),
    ({"prompt": 7}, 400, "INVALID_ARGUMENT", "prompt"),
    ({"echo": True}, 400, "INVALID_ARGUMENT", "echo"),
    ({"best_of": 3}, 400, "INVALID_ARGUMENT", "best_of"),
    ({"logit_bias": {"1": 2}}, 400, "INVALID_ARGUMENT", "logit_bias"),
    ({"presence_penalty": 1}, 400, "INVALID_ARGUMENT", "presence_penalty"),
    ({"response_format": {"type": "json_object"}}, 400, "INVALID_ARGUMENT", "response_format"),
    ({"max_completion_tokens": 0}, 400, "INVALID_ARGUMENT", "max_tokens"),
    ({"top_k": -1}, 400, "INVALID_ARGUMENT", "top_k"),
    ({"min_p": 2}, 400, "INVALID_ARGUMENT", "min_p"),
    ({"n": 9}, 400, "INVALID_ARGUMENT", "n"),
    ({"n": 2**40}, 400, "INVALID_ARGUMENT", "n"),
    ({"seed": 2**64}, 400, "INVALID_ARGUMENT", "seed"),
    ({"temperature": -1}, 400, "INVALID_ARGUMENT", "temperature"),
    ({"max_tokens": 0}, 400, "INVALID_ARGUMENT", "max_tokens"),
    ({"max_tokens": 500}, 400, "PROMPT_TOO_LONG", "prompt"),
    ({"stop": [""]}, 400, "INVALID_ARGUMENT", "stop"),
    ({"model": "none"}, 404, "PROJECT_NOT_FOUND", "model"),
    ({"model": "No Such!"}, 404, "MODEL_NOT_FOUND", "model"),
    ({"model": "demo@latest"}, 404, "MODEL_NOT_FOUND", "model"),
    ({"model": "demo@r/1"}, 404, "CHECKPOINT_NOT_FOUND", "model"),
]


async def test_what_other_servers_clients_say_besides_is_heeded_or_harmless(gateway: Gateway) -> None:
    whole = (await gateway.post("/v1/completions", CODE)).json()["choices"][0]["text"]
    harmless = {"logprobs": False, "best_of": 1, "echo": False, "logit_bias": {}, "response_format": {"type": "text"}}
    unknown = {"repeat_last_n": 64, "cache_prompt": True, "tool_choice": "none", "stream_options": None}
    told = await gateway.post("/v1/completions", {**CODE, **harmless, **unknown, "stop": None, "suffix": None})
    assert told.json()["choices"][0] == {
        "text": whole, "index": 0, "logprobs": None, "finish_reason": "length", "codegraft_reason": "LENGTH",
    }  # fmt: skip
    few = await gateway.post("/v1/completions", {**CODE, "max_completion_tokens": 3})
    assert few.json()["usage"]["completion_tokens"] == 3, "it is the newer word"
    hot = {**CODE, "temperature": 2, "seed": 1}
    texts = [
        (await gateway.post("/v1/completions", {**hot, **narrow})).json()["choices"][0]["text"]
        for narrow in ({}, {"top_k": 1}, {"min_p": 1})
    ]
    assert texts[0] != whole and texts[1:] == [whole, whole], "only the likeliest is left"
    fresh = await gateway.post("/v1/completions", {**CODE, "repetition_penalty": 2})
    assert fresh.json()["choices"][0]["text"] != whole
    drawn = [
        (await gateway.post("/v1/fim/completions", {**CODE, "temperature": 2, **seed})).json()["choices"][0]["message"]
        for seed in ({"seed": 7}, {"random_seed": 7}, {"random_seed": 8})
    ]
    assert drawn[0] == drawn[1] != drawn[2], "as Mistral calls it"


async def test_bad_requests_name_the_field_and_the_reason(gateway: Gateway) -> None:
    for change, status, code, param in BAD:
        for stream in (False, True):
            answer = await gateway.post("/v1/completions", {**CODE, **change, "stream": stream})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
            kind = "invalid_request_error" if status == 400 else "not_found_error"
            assert error["type"] == kind and error["message"]
    tokens = (await gateway.post("/v1/completions", {**CODE, "prompt": [1, 2]})).json()["error"]
    assert tokens["message"].startswith("prompt: ") and tokens["param"] == "prompt"
    chat = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 21}
    assert (await gateway.post("/v1/chat/completions", chat)).json()["error"]["param"] == "top_logprobs"


async def test_openai_raises_its_own_classes(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="demo", prompt="")
    assert (bad.value.code, bad.value.param) == ("EMPTY_PROMPT", "prompt")
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="none", prompt="x")


# --- which model answers ---


async def test_after_a_swap_the_next_request_is_answered_by_the_new_adapter_and_says_so(
    world: World, gateway: Gateway
) -> None:
    before = await gateway.post("/v1/completions", CODE)
    best = await world.store(10, seed=1)
    await world.publish(best)
    await world.until_active(best.sha256)
    after = await gateway.post("/v1/completions", CODE)
    assert (before.headers["x-codegraft-adapter"], after.headers["x-codegraft-adapter"]) == ("base", best.sha256)
    assert after.headers["x-codegraft-checkpoint"] == best.checkpoint
    assert after.json()["system_fingerprint"] == f"tiny+{best.sha256}"
    texts = [answer.json()["choices"][0]["text"] for answer in (before, after)]
    for name, sha256, text in (
        ("demo@base", "base", texts[0]),
        ("smollm2-135m", "base", texts[0]),
        (f"demo@one/{best.checkpoint.rpartition('/')[2]}", best.sha256, texts[1]),
        ("demo", best.sha256, texts[1]),
    ):
        answer = await gateway.post("/v1/completions", {**CODE, "model": name})
        assert (answer.headers["x-codegraft-adapter"], answer.json()["choices"][0]["text"]) == (sha256, text)
        assert answer.json()["model"] == name


async def test_models_are_the_base_the_aliases_and_the_checkpoints(
    world: World, gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    best = await world.store(10, seed=1)
    await world.publish(best)
    await gateway.post("/v1/completions", CODE)  # the first one makes the policy
    await world.until_active(best.sha256)
    base = (await gateway.http.get("/v1/models")).json()["data"][0]["id"]
    known = Checkpoint(name=best.checkpoint, sha256=best.sha256, base_model=base)
    other = Checkpoint(name=f"{RUN}/checkpoints/2", base_model="another")
    gateway.neighbours.scripts["ListRuns"] = [ListRunsResponse(runs=[Run(name=RUN)])]
    gateway.neighbours.scripts["ListCheckpoints"] = [ListCheckpointsResponse(checkpoints=[known, other])]
    listed = [model.id async for model in client.models.list()]
    assert listed == ["smollm2-135m", "demo", "demo@base", "demo@one/10"]
    alias = (await gateway.http.get("/v1/models/demo")).json()["codegraft"]
    assert (alias["policy"], alias["checkpoint"], alias["adapter_sha256"]) == (
        "LATEST_BEST",
        best.checkpoint,
        best.sha256,
    )
    assert (await client.models.retrieve("demo@one/10")).id == "demo@one/10"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-5")
    gateway.neighbours.scripts["ListRuns"] = [errors.Unavailable("away", retry_after=60)]
    assert [model.id async for model in client.models.list()] == ["smollm2-135m", "demo", "demo@base"]


async def test_the_project_may_stand_in_the_address_or_in_a_header(gateway: Gateway) -> None:
    unnamed = {key: value for key, value in CODE.items() if key != "model"}
    for path, headers in (
        ("/projects/demo/v1/completions", {}),
        ("/v1/completions", {"x_codegraft_project": "demo"}),
        ("/v1/completions", {}),  # there is only one
    ):
        answer = await gateway.post(path, unnamed, **headers)
        assert answer.status_code == 200 and answer.json()["model"] == "demo", answer.text
    clash = await gateway.post("/projects/other/v1/completions", CODE)
    assert clash.status_code == 400 and clash.json()["error"]["param"] == "model"
    projects = gateway.neighbours.scripts["ListProjects"][0]
    projects.projects.add(name="projects/second")  # type: ignore[union-attr]
    asked = await gateway.post("/v1/completions", unnamed)
    assert asked.status_code == 400 and "X-Codegraft-Project" in asked.json()["error"]["message"]


# --- leaving, and being replaced ---


async def test_a_client_that_goes_away_frees_its_place_at_once(world: World, gateway: Gateway) -> None:
    engine = world.replica.model.result().engine

    async def ask(path: str, stream: bool) -> None:
        # It cannot end by itself: eight of the longest texts in four places.
        body = {**CODE, "max_tokens": 220, "n": 8, "input_prefix": CODE["prompt"], "n_predict": 220, "stream": stream}
        async with gateway.http.stream("POST", path, json=body) as response:
            async for _ in response.aiter_raw():
                pass

    for path in ("/v1/completions", "/v1/fim/completions", "/infill"):
        for stream in (True, False):
            with world.unhurried():  # twenty seconds for all of it
                asking = asyncio.create_task(ask(path, stream))
                await until(lambda: engine.load[0] > 0)
                asking.cancel()
                await asyncio.wait([asking])
                await until(lambda: engine.load == (0, 0) and not world.replica.registry.streams(PROJECT), seconds=8)


async def test_a_newer_request_of_a_session_drops_the_older(world: World, gateway: Gateway) -> None:
    engine = world.replica.model.result().engine
    for headers, user in (({"x_codegraft_session": "window-1"}, None), ({}, "window-1")):
        body = {**CODE, "max_tokens": 220, "user": user}
        with world.unhurried():
            older = asyncio.create_task(gateway.post("/v1/completions", body, **headers))
            await until(lambda: engine.load[0] == 1)
            newer = await gateway.post("/v1/completions", {**body, "max_tokens": 4}, **headers)
        choice = (await older).json()["choices"][0]
        assert (choice["finish_reason"], choice["codegraft_reason"]) == ("length", "SUPERSEDED")
        assert newer.json()["choices"][0]["codegraft_reason"] == "LENGTH"


async def test_what_one_caller_calls_its_session_drops_nothing_of_anothers(world: World) -> None:
    """Plugins like to send one constant word for all of their users."""
    completions, engine = world.replica.services[0][1]._domain, world.replica.model.result().engine

    async def ask(key: str, tokens: int) -> Reason:
        set_current(Caller(key, Role.COMPLETER, None))
        request = Request(PROJECT, Code("a.py", CODE["prompt"], ""), stop=Stop(tokens), session="my-plugin")
        return [part async for part in completions.run(request)][-1].reason  # type: ignore[no-any-return]

    with world.unhurried():
        older = asyncio.create_task(ask("keys/a", 220))
        await until(lambda: engine.load[0] == 1)
        assert await asyncio.create_task(ask("keys/b", 4)) is Reason.LENGTH
        assert not older.done()
        assert await asyncio.create_task(ask("keys/a", 4)) is Reason.LENGTH and await older is Reason.SUPERSEDED


async def test_a_full_queue_says_when_to_come_back(worlds: Callable[..., Any], gateways: Callable[..., Any]) -> None:
    world: World = await worlds(limits=Limits(running=1, waiting=1, step_tokens=32, kv_tokens=8192))
    gateway: Gateway = await gateways(world)
    engine = world.replica.model.result().engine
    with world.unhurried():
        running = asyncio.create_task(gateway.post("/v1/completions", {**CODE, "max_tokens": 220}))
        await until(lambda: engine.load == (1, 0))
        waiting = asyncio.create_task(gateway.post("/v1/completions", CODE))
        await until(lambda: engine.load == (1, 1))
        refused = await gateway.post("/v1/completions", {**CODE, "stream": True})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "QUEUE_FULL" and refused.json()["error"]["type"] == "rate_limit_error"
    assert (await running).status_code == (await waiting).status_code == 200


async def test_time_that_runs_out_leaves_the_text_so_far(
    worlds: Callable[..., Any], gateways: Callable[..., Any]
) -> None:
    world: World = await worlds(limits=Limits(running=1, waiting=8, step_tokens=32, kv_tokens=8192))

    async def attempt(seconds: float) -> bool:
        gateway: Gateway = await gateways(world, gateway_timeout_seconds=seconds)
        answer = await gateway.post("/v1/completions", {**CODE, "max_tokens": 220, "n": 8, "temperature": 1})
        if answer.status_code != 200:
            return False
        assert "DEADLINE" in {choice["codegraft_reason"] for choice in answer.json()["choices"]}
        return True

    with world.unhurried(0.03):
        await in_time(attempt)


# --- chat, and fill-in-the-middle as Mistral has it ---


async def test_chat_needs_an_instruct_model(world: World, client: openai.AsyncOpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="demo", messages=messages)
    assert refused.value.code == "CHAT_UNSUPPORTED" and "chat template" in refused.value.message
    tokenizer = world.replica.model.result().tokenizer
    tokenizer.chat_template = "{% for m in messages %}<file_sep>{{ m.role }}:{{ m.content }}{% endfor %}"
    try:
        ask: Any = {"model": "demo", "messages": messages, "max_completion_tokens": 6, "logprobs": True}
        whole = await client.chat.completions.create(**ask, top_logprobs=20)
        text, roles = "", []
        async for chunk in await client.chat.completions.create(**ask, stream=True):
            roles += [choice.delta.role for choice in chunk.choices]
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    finally:
        tokenizer.chat_template = None
    assert whole.choices[0].message.content == text and roles[0] == "assistant" and whole.usage
    assert whole.usage.prompt_tokens == 2 + len("system:Be brief.user:hi") and whole.usage.completion_tokens == 6
    known = whole.choices[0].logprobs
    assert known and known.content and len(known.content) == 6 and len(known.content[0].top_logprobs) == 20
    assert bytes(known.content[0].bytes or []).decode(errors="replace")[0] == text[0]


async def test_chat_refuses_what_it_cannot_do(gateway: Gateway) -> None:
    user = {"role": "user", "content": "hi"}
    for body, param in (
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [user], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [user], "functions": [{"name": "f"}]}, "functions"),
        ({"messages": [user], "logit_bias": {"1": 2}}, "logit_bias"),
        ({"messages": [user], "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": [user, {"role": "assistant", "content": "x"}]}, "messages"),
    ):
        answer = await gateway.post("/v1/chat/completions", {"model": "demo", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_fill_in_the_middle_as_continue_asks_for_it(gateway: Gateway) -> None:
    """The body that @continuedev/openai-adapters 1.37.0 (npm) sends from ``OpenAIApi.fimStream``."""
    whole = (await gateway.post("/v1/completions", {**CODE, "suffix": "\n}"})).json()["choices"][0]["text"]
    body = {
        "model": "demo",
        "prompt": CODE["prompt"],
        "suffix": "\n}",
        "max_tokens": 24,
        "stream": True,
        "path": "a.py",
    }
    async with gateway.http.stream("POST", "/v1/fim/completions", json=body) as response:
        raw = await events(response)
    assert raw[-1] == "[DONE]"
    chunks = [json.loads(data) for data in raw[:-1]]
    assert "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks) == whole
    assert chunks[0]["object"] == "chat.completion.chunk" and chunks[-1]["choices"][0]["finish_reason"]


async def test_two_runs_with_the_same_weights_keep_their_names(world: World, gateway: Gateway) -> None:
    """The weights are one version, in one place; who names the second run's checkpoint is not told of the first's."""
    one, two = await world.store(10, seed=1), await world.store(20, seed=1, run=f"{PROJECT}/runs/two")
    other = await world.store(5, seed=1, run="projects/other/runs/three")
    assert one.sha256 == two.sha256 == other.sha256
    async with AsyncCodegraft(Addresses(*[world.address] * 4)) as codegraft:
        for best in (one, two, one):
            await world.set("PINNED", best.checkpoint)
            status = await world.status()
            assert status.status.active_checkpoint == status.serving.history[0].checkpoint == best.checkpoint
            answer = await gateway.post("/v1/completions", CODE)
            assert answer.headers["x-codegraft-checkpoint"] == best.checkpoint
            told = {"completion_id": answer.json()["id"], "event": "accepted", "model": "demo"}
            assert (await gateway.post("/v1/feedback", told)).status_code == 200
            (entry,) = (await codegraft.feedback.acceptance("demo")).adapters
            assert entry.checkpoint == best.checkpoint
        named = await gateway.post("/v1/completions", {**CODE, "model": "demo@two/20"})
        assert named.headers["x-codegraft-checkpoint"] == two.checkpoint
        elsewhere = await gateway.post("/v1/completions", {**CODE, "model": "other@three/5"})
        assert elsewhere.headers["x-codegraft-checkpoint"] == other.checkpoint, "nothing of another project"
    assert len(world.replica.registry.holdings()) == 1
    assert len(world.told("codegraft.inference.adapter.swapped.v1")) == 1, "the names differ, the version does not"
    await world.set("OFF")
    await world.set("PINNED", two.checkpoint)
    assert (await world.status()).status.active_checkpoint == two.checkpoint


# --- feedback ---


async def test_texts_are_kept_only_where_the_project_says_so(world: World, gateway: Gateway) -> None:
    completion = (await gateway.post("/v1/completions", CODE)).json()["id"]
    body = {"completion_id": completion, "event": "accepted", "model": "demo", "text": "y = 1"}
    assert (await gateway.post("/v1/feedback", body)).status_code == 200
    assert not await world.runtime.state("completions").list(), "off by default"
    world.peers.keeps = True
    assert (await gateway.post("/v1/feedback", {**body, "text": ""})).status_code == 200
    assert (await gateway.post("/v1/feedback", body)).json() == {"recorded": False}
    async with AsyncCodegraft(Addresses(*[world.address] * 4)) as codegraft:
        (kept,) = [each async for each in codegraft.feedback.kept("demo", page_size=1)]
        assert (kept.accepted, kept.shown, kept.name) == (b"y = 1", b"", f"{PROJECT}/completions/{completion[5:]}")
        assert [each async for each in codegraft.feedback.kept("demo2")] == []
        with pytest.raises(errors.ProjectNotFound):
            await codegraft.feedback.delete_kept("none")
        assert await codegraft.feedback.delete_kept("demo") == 1
        assert [each async for each in codegraft.feedback.kept("demo")] == []
    long = await gateway.post("/v1/feedback", {**body, "text": "x" * 20_001})
    assert long.status_code == 400 and long.json()["error"]["param"] == "text"


async def test_feedback_is_counted_for_the_version_that_answered(world: World, gateway: Gateway) -> None:
    base = (await gateway.post("/v1/completions", CODE)).json()["id"]
    best = await world.store(10, seed=1)
    await world.publish(best)
    await world.until_active(best.sha256)
    adapted = (await gateway.post("/infill", {"input_prefix": "x = ", "n_predict": 2, "model": "demo"})).json()["id"]
    for completion, event, characters, news in (
        (base, "shown", 0, True),
        (base, "rejected", 0, True),
        (adapted, "accepted", 5, True),
        (adapted, "accepted", 5, False),
        (adapted, "shown", 0, False),
    ):
        body = {"completion_id": completion, "event": event, "accepted_characters": characters, "model": "demo"}
        answer = await gateway.post("/v1/feedback", body)
        assert (answer.status_code, answer.json()) == (200, {"recorded": news})
    table = [key for key in (await world.runtime.state("inference").list("FeedbackHour"))]
    assert table, "it is in the shared state"
    async with AsyncCodegraft(Addresses(*[world.address] * 4)) as codegraft:
        found = (await codegraft.feedback.acceptance("demo")).adapters
    assert {entry.adapter_sha256: (entry.shown, entry.accepted, entry.rejected) for entry in found} == {
        "": (1, 0, 1),
        best.sha256: (1, 1, 0),
    }
    assert {entry.checkpoint for entry in found} == {"", best.checkpoint}
    told = [
        (labels["version"], labels["event"], sample.value)
        for family in figures.FEEDBACK.collect()
        for sample in family.samples
        if (labels := sample.labels) and labels["project"] == "demo" and sample.name.endswith("_total")
    ]
    assert {(version, event) for version, event, _ in told} >= {
        ("base", "shown"), ("base", "rejected"), (best.sha256[:12], "accepted"), (best.sha256[:12], "shown"),
    }  # fmt: skip
    for change, param in (
        ({"completion_id": "cmpl-1"}, "completion_id"),
        ({"event": "liked"}, "event"),
        ({"accepted_characters": -1}, "accepted_characters"),
        ({"model": "none"}, "model"),
    ):
        body = {"completion_id": base, "event": "shown", "model": "demo", **change}
        answer = await gateway.post("/v1/feedback", body)
        assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param
