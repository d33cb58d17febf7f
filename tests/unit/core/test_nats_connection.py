"""Failures of the NATS client, as the rest of the system sees them."""

from __future__ import annotations

import asyncio

import nats.errors
import nats.js.errors
import pytest

from services.core import errors
from services.core.nats_connection import translated


@pytest.mark.parametrize(
    "failure",
    [
        nats.errors.TimeoutError(),
        nats.errors.NoRespondersError(),
        nats.errors.ConnectionClosedError(),
        nats.js.errors.ServiceUnavailableError(code=503, err_code=10008, description="no leader"),
        nats.js.errors.NoStreamResponseError(),
        ConnectionRefusedError(),
        TimeoutError(),
    ],
)
async def test_outages_are_named(failure: Exception) -> None:
    with (
        pytest.raises(errors.StateUnavailable, match=r"could not read projects/p: ..") as raised,
        translated("read projects/p"),
    ):
        raise failure
    assert raised.value.__cause__ is failure
    assert raised.value.retry_after


async def test_our_own_errors_pass() -> None:
    with pytest.raises(errors.RevisionMismatch), translated("write projects/p"):
        raise errors.RevisionMismatch("no")


async def test_a_swallowed_cancellation_is_raised_all_the_same() -> None:
    """What asyncio.wait_for does on Python 3.11 when the result comes together with the cancellation."""
    begun, went_on = asyncio.Event(), False

    async def swallows() -> None:
        nonlocal went_on
        with translated("read projects/p"):
            try:
                begun.set()
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
        went_on = True

    task = asyncio.create_task(swallows())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not went_on


async def test_after_a_cancellation_was_handled_calls_work() -> None:
    """Giving a job back happens in a task that was cancelled before."""

    async def gives_back() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            with translated("give back"):
                await asyncio.sleep(0)
            return "given back"
        return ""

    task = asyncio.create_task(gives_back())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "given back"
