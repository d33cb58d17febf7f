"""llama.cpp's editor plugins against the gateway: their own requests, as their sources have them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1.completion_pb2 import CodePrompt, ContextChunk
from tests.contract.gateway_world import Gateway
from tests.contract.inference_world import World

pytest_plugins = ["tests.contract.gateway_fixtures"]

PREFIX, LINE, SUFFIX = "import os\n\n\ndef main():\n", "    retu", "\n\nmain()\n"
CHUNKS = [
    {"text": "def one():\n    return 1\n", "time": 1719, "filename": "one.py"},
    {"text": "def two():\n    return 2\n", "time": 1723, "filename": "two.py"},
]


def vscode(**fields: Any) -> dict[str, Any]:
    """https://github.com/ggml-org/llama.vscode/blob/3938fb35/src/llama-server.ts: createRequestPayload."""
    return {
        "id_slot": 0,
        "input_prefix": PREFIX,
        "input_suffix": SUFFIX,
        "input_extra": CHUNKS,
        "prompt": LINE,
        "n_predict": 128,
        "n_cmpl": 3,
        "top_k": 40,
        "top_p": 0.99,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "n_indent": 4,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 2500,
        **fields,
    }


def vim(**fields: Any) -> dict[str, Any]:
    """https://github.com/ggml-org/llama.vim/blob/a1c8e6e4/autoload/llama.vim: llama#fim."""
    names = ["prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"]
    names += ["predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second"]
    return vscode(
        stop=[],
        top_p=0.90,
        t_max_predict_ms=250,
        response_fields=["content", *(f"timings/{name}" for name in names), "truncated", "tokens_cached"],
        **fields,
    )


async def test_llama_vscode_gets_what_it_reads(world: World, gateway: Gateway) -> None:
    """Its ``LlamaResponse``; the endpoint that a person sets may name the project. Of the completions that it takes
    (n_cmpl) it gets the likeliest one, in the form of one: others would be less likely, and make it wait longer."""
    answer = await gateway.post("/projects/demo/infill", vscode(n_predict=24))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    others = [ContextChunk(path=str(chunk["filename"]), text=str(chunk["text"])) for chunk in reversed(CHUNKS)]
    prompt = CodePrompt(prefix=PREFIX + LINE, suffix=SUFFIX, context=others)
    direct = await world.complete(prompt=prompt, max_tokens=24).end()
    assert body["content"] == direct.text
    assert body["tokens_evaluated"] == direct.started.prompt_tokens and body["tokens_cached"] == 0
    assert body["truncated"] is direct.started.prompt_truncated and body["stop"] is True
    assert body["stop_type"] == "limit" and body["generation_settings"]["n_predict"] == 24
    timings = body["timings"]
    assert timings["prompt_n"] == body["tokens_evaluated"] and timings["predicted_n"] == body["tokens_predicted"]
    assert timings["prompt_ms"] > 0 < timings["predicted_ms"] and timings["predicted_per_second"] > 0
    again = await gateway.post("/projects/demo/infill", vscode(n_predict=24))
    assert again.json()["tokens_cached"] > 0 and again.headers["x-codegraft-adapter"] == "base"


async def test_llama_vim_gets_the_fields_it_names(gateway: Gateway) -> None:
    answer = (await gateway.post("/infill", vim(n_predict=8))).json()
    assert set(answer) == set(vim()["response_fields"])
    assert answer["content"] and answer["timings/predicted_n"] > 0
    raw = (await gateway.post("/infill", vim(n_predict=8))).text
    assert re.match(r"\s*{", raw) and re.search(r'"content"\s*:"', raw), "what it looks for before it reads it as JSON"


async def test_warming_up_generates_nothing(world: World, gateway: Gateway) -> None:
    """llama.vscode's updateExtraContext, in its older form, too; llama.vim's wants no field of the answer."""
    empty = {"input_prefix": "", "input_suffix": "", "prompt": "", "t_max_predict_ms": 1}
    for body in (vscode(**empty, n_predict=1, samplers=["temperature"]), vscode(n_predict=0, samplers=[])):
        answer = await gateway.post("/infill", body)
        assert answer.status_code == 200 and answer.json()["content"] == "" and answer.json()["stop_type"] == "none"
    assert (await gateway.post("/infill", vim(n_predict=0) | {"response_fields": [""]})).json() == {}


async def test_a_stream_is_llama_cpps(gateway: Gateway) -> None:
    whole = (await gateway.post("/infill", vscode(n_predict=24))).json()
    async with gateway.http.stream("POST", "/infill", json=vscode(n_predict=24, stream=True)) as response:
        lines = [json.loads(line.removeprefix("data: ")) async for line in response.aiter_lines() if line]
    assert "".join(line["content"] for line in lines) == whole["content"]
    assert [line["stop"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["tokens_predicted"] == whole["tokens_predicted"] and "timings" in lines[-1]


async def test_the_time_limit_holds_once_there_is_a_line(gateways: Callable[..., Any]) -> None:
    gateway: Gateway = await gateways()

    seen = asyncio.Event()

    def text(value: str) -> Any:
        return pb.CompleteResponse(delta=pb.Delta(text=value, tokens=1))

    async def late(request: object) -> Any:
        await seen.wait()
        await asyncio.sleep(0.05)
        return text("b")

    started = pb.CompleteResponse(started=pb.Started(completion_id="c", prompt_tokens=9))
    slow = [started, text("a"), late, text("\n"), lambda _: asyncio.sleep(60)]
    gateway.neighbours.scripts["Complete"] = [slow]  # type: ignore[list-item]
    content, lines = "", []
    async with gateway.http.stream("POST", "/infill", json=vscode(t_max_predict_ms=20, stream=True)) as response:
        async for line in response.aiter_lines():
            if line:
                lines.append(json.loads(line.removeprefix("data: ")))
                content += lines[-1]["content"]
                seen.set()  # the gateway has the first token: its clock runs
    assert content == "ab\n" and (lines[-1]["stop_type"], lines[-1]["tokens_predicted"]) == ("limit", 3)
    assert lines[-1]["timings"]["predicted_ms"] >= 50
    await asyncio.wait_for(gateway.neighbours.cancelled.wait(), 20)


async def test_an_answer_as_a_whole_ends_at_the_time_limit_too(gateways: Callable[..., Any]) -> None:
    gateway: Gateway = await gateways()

    async def more(request: object) -> Any:
        await asyncio.sleep(0.03)
        return pb.CompleteResponse(delta=pb.Delta(text="b", tokens=1))

    started = pb.CompleteResponse(started=pb.Started(completion_id="c", prompt_tokens=9))
    line = pb.CompleteResponse(delta=pb.Delta(text="a\n", tokens=1))
    gateway.neighbours.scripts["Complete"] = [[started, line, *[more] * 300]]  # type: ignore[list-item]
    answer = (await gateway.post("/infill", vscode(t_max_predict_ms=20))).json()
    assert answer["content"].startswith("a\nb") and answer["stop_type"] == "limit"
    assert answer["tokens_predicted"] == len(answer["content"]) - 1 < 300


async def test_temperature_samples_and_its_absence_does_not(gateway: Gateway) -> None:
    async def text(**fields: Any) -> str:
        return str((await gateway.post("/infill", vscode(n_predict=16, **fields))).json()["content"])

    greedy = await text()
    assert await text(seed=7) == greedy == await text(temperature=0)
    one, same = await text(temperature=1.5, seed=7), await text(temperature=1.5, seed=7)
    assert one == same != greedy
    assert await text(temperature=1.5, seed=-1) != await text(temperature=1.5, seed=-1)


async def test_a_new_line_finds_the_cache_though_the_editors_window_slides(gateway: Gateway) -> None:
    lines = [f"{number:03x}\n" for number in range(400)]
    prompts = cached = 0
    for at in range(300, 312):
        body = {"input_prefix": "".join(lines[at - 200 : at]), "prompt": "x", "n_predict": 1}
        answer = (await gateway.post("/projects/demo/infill", body)).json()
        assert answer["truncated"]
        prompts, cached = prompts + answer["tokens_evaluated"], cached + answer["tokens_cached"]
    assert cached > 0.5 * prompts, "else every line is computed anew"
