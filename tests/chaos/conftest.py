"""One whole stack for the tests of this folder that need one: it takes seconds to start."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from services.client.aio.client import AsyncCodegraft
from tests.chaos.disk import SmallDisk
from tests.chaos.proxy import Network
from tests.chaos.stack import WholeStack
from tests.unit.inference import tiny

LONG = "CHAOS_SECONDS" in os.environ


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    folder = tmp_path_factory.mktemp("whole")
    base = folder / "base"
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = {
        # Training in a thread starts seconds sooner than in processes of its own, and ends with the service.
        "CODEGRAFT_TRAINER_LAUNCHER": "elastic" if LONG else "thread",
        "CODEGRAFT_SCANNER_PART_TOKENS": "1000",
        "CODEGRAFT_SCANNER_WORKERS": "2",
        "CODEGRAFT_INFERENCE_KV_TOKENS": "8192",
        "CODEGRAFT_INFERENCE_PROMPT_TOKENS": "256",
    }
    network = Network()
    with SmallDisk.of(folder / "s3", 256 << 20) as s3, SmallDisk.of(folder / "data", 64 << 20) as data:
        made = WholeStack(folder / "stack", network, base, s3=s3, data=data, settings=settings)
        try:
            made.start()
            yield made
        finally:
            made.stop()
            network.close()


@pytest.fixture
async def client(stack: WholeStack) -> AsyncIterator[AsyncCodegraft]:
    async with stack.client() as made:
        yield made
