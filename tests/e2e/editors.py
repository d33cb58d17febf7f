"""Editors' clients that others wrote, against the gateway of a real stack: openai, blocking and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import openai

CODE: dict[str, Any] = {
    "prompt": "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    "max_tokens": 16,
    "extra_body": {"path": "fibonacci.py"},
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask_blocking(url: str, key: str, model: str) -> dict[str, Any]:
    """Whole and streamed completions of one prompt, the models, and errors, as openai's blocking client sees them."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        answer = client.completions.create(model=model, **CODE)
        streamed = "".join(
            choice.text
            for chunk in client.completions.create(model=model, **CODE, stream=True)
            for choice in chunk.choices
        )
        base = client.completions.create(model=f"{model}@base", **CODE)
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        said = client.chat.completions.create(model=f"{model}@base", messages=question, max_tokens=32, temperature=0)
        seen: dict[str, Any] = {
            "text": answer.choices[0].text,
            "streamed": streamed,
            "base": base.choices[0].text,
            "fingerprints": [answer.system_fingerprint, base.system_fingerprint],
            "usage": answer.usage.completion_tokens if answer.usage else 0,
            "models": [model.id for model in client.models.list()],
            "id": answer.id,
            "chat": [said.choices[0].message.content, said.choices[0].finish_reason],
        }
        mistakes: dict[str, Callable[[], object]] = {
            "no such model": lambda: client.completions.create(model="nobody", prompt="x"),
            "nothing to complete": lambda: client.completions.create(model=model, prompt=""),
        }
        with openai.OpenAI(base_url=f"{url}/v1", api_key="cg_nobody_nothing", max_retries=0) as stranger:
            mistakes["no such key"] = lambda: stranger.completions.create(model=model, prompt="x")
            seen["errors"] = {name: _error(make) for name, make in mistakes.items()}
    return seen


def _error(make: Callable[[], object]) -> list[str | None]:
    try:
        make()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.code]
    return []


async def ask_without_blocking(url: str, key: str, model: str) -> dict[str, Any]:
    """The same completion, streamed by openai's asynchronous client, and what a fill-in-the-middle client gets."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        text, usage = "", 0
        async for chunk in await client.completions.create(
            model=model, **CODE, stream=True, stream_options={"include_usage": True}
        ):
            text += "".join(choice.text for choice in chunk.choices)
            usage = chunk.usage.completion_tokens if chunk.usage else usage
    infill = {"input_prefix": CODE["prompt"], "prompt": "", "input_suffix": "\n", "n_predict": 16}
    async with httpx2.AsyncClient(base_url=url, timeout=60, headers=bearer(key)) as http:
        llama = await http.post(f"/projects/{model}/infill", json=infill)
    return {"text": text, "usage": usage, "infill": llama.json(), "adapter": llama.headers["x-codegraft-adapter"]}
