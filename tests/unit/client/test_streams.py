"""Watches that survive broken connections, waits, and completions that can be stopped."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import pytest

from codegraft.common.v1.job_pb2 import Failure, JobState, JobStatus
from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.ingest.v1 import source_pb2
from codegraft.scanner.v1 import scan_pb2
from codegraft.trainer.v1 import run_event_pb2, run_pb2
from services.client import Addresses, AsyncCodegraft, Codegraft, Piece, retry
from services.core import errors

RUN, SCAN, SOURCE = "projects/p/runs/r", "projects/p/scans/s", "projects/p/sources/s"


async def hang(request: Any) -> Any:
    await asyncio.sleep(30)


def event(sequence: int) -> run_pb2.WatchRunResponse:
    return run_pb2.WatchRunResponse(event=run_event_pb2.RunEvent(sequence=sequence))


def scan(state: JobState, failure: Failure | None = None) -> scan_pb2.Scan:
    return scan_pb2.Scan(name=SCAN, status=JobStatus(state=state, failure=failure))


# --- watches ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
async def test_a_runs_story_goes_on_behind_its_last_event(codegraft: Any, fake: Any) -> None:
    broken = errors.Unavailable("the connection broke")
    fake.scripts["WatchRun"] = [
        [event(1), event(2), broken], [broken], [event(3), errors.ShuttingDown("draining")], [event(4)],
    ]  # fmt: skip
    story = await codegraft.take(lambda c: c.runs.watch(RUN))
    assert [message.event.sequence for message in story] == [1, 2, 3, 4]
    assert [request.after_sequence for request in fake.requests["WatchRun"]] == [0, 2, 2, 3]


@pytest.mark.usefixtures("hasty")
async def test_a_watch_of_what_is_not_there_says_so(codegraft: Any, fake: Any) -> None:
    fake.scripts["WatchRun"] = [[errors.RunNotFound("no such run")]]
    with pytest.raises(errors.RunNotFound):
        await codegraft.take(lambda c: c.runs.watch(RUN))
    assert fake.count("WatchRun") == 1


@pytest.mark.usefixtures("hasty")
async def test_a_watch_is_given_up_when_nobody_answers_and_later_when_it_was_under_way(
    codegraft: Any, fake: Any
) -> None:
    fake.scripts["WatchRun"] = [[errors.Unavailable("away")]]
    with pytest.raises(errors.Unavailable):
        await codegraft.take(lambda c: c.runs.watch(RUN))
    assert fake.count("WatchRun") == retry.ATTEMPTS
    fake.requests.clear()
    fake.scripts["WatchRun"] = [[event(1), errors.Unavailable("away")], [errors.Unavailable("away")]]
    with pytest.raises(errors.Unavailable):
        await codegraft.take(lambda c: c.runs.watch(RUN))
    assert fake.count("WatchRun") == 2 * retry.ATTEMPTS


async def test_a_watch_that_is_left_ends_the_call(codegraft: Any, fake: Any) -> None:
    fake.scripts["WatchRun"] = [[event(1), hang]]
    assert len(await codegraft.take(lambda c: c.runs.watch(RUN), 1)) == 1
    await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_closing_the_blocking_client_ends_a_watch_in_another_thread(fake: Any, address: str) -> None:
    fake.scripts["WatchRun"] = [[event(1), hang]]
    client, begun = Codegraft(Addresses(address, address, address, address)), threading.Event()

    def watch() -> None:
        for _ in client.runs.watch(RUN):
            begun.set()

    watching = asyncio.create_task(asyncio.to_thread(watch))
    assert await asyncio.to_thread(begun.wait, 20)
    await asyncio.sleep(0.1)
    client.close()
    with pytest.raises(errors.Cancelled):
        await asyncio.wait_for(watching, 5)


# --- waits ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
async def test_waiting_for_a_scan_gives_its_last_state(codegraft: Any, fake: Any) -> None:
    running, done = scan(JobState.JOB_STATE_RUNNING), scan(JobState.JOB_STATE_SUCCEEDED)
    fake.scripts["WatchScan"] = [
        [scan_pb2.WatchScanResponse(scan=running), errors.Unavailable("broke")],
        [scan_pb2.WatchScanResponse(scan=done)],
    ]
    fake.scripts["GetScan"] = [scan_pb2.GetScanResponse(scan=done)]
    found = await codegraft.call(lambda c: c.scans.wait(SCAN))
    assert found.status.state == JobState.JOB_STATE_SUCCEEDED


async def test_a_failed_job_raises_its_own_reason(codegraft: Any, fake: Any) -> None:
    failure = Failure(reason="EMPTY_DATASET", message="no file was accepted", hint="loosen the filters")
    failed = scan(JobState.JOB_STATE_FAILED, failure)
    fake.scripts["GetScan"] = [scan_pb2.GetScanResponse(scan=failed)]
    with pytest.raises(errors.EmptyDataset, match="no file was accepted") as caught:
        await codegraft.call(lambda c: c.scans.wait(SCAN))
    assert caught.value.hint == "loosen the filters"


async def test_a_cancelled_job_raises(codegraft: Any, fake: Any) -> None:
    cancelled = run_pb2.Run(name=RUN, status=JobStatus(state=JobState.JOB_STATE_CANCELLED))
    fake.scripts["GetRun"] = [run_pb2.GetRunResponse(run=cancelled)]
    with pytest.raises(errors.JobCancelled):
        await codegraft.call(lambda c: c.runs.wait(RUN))


def source(state: source_pb2.SourceState, generation: int, fetched: int, **more: Any) -> source_pb2.WatchSourceResponse:
    found = source_pb2.Source(name=SOURCE, state=state, generation=generation, fetched_generation=fetched, **more)
    return source_pb2.WatchSourceResponse(source=found)


async def test_waiting_for_a_source_waits_for_the_sync_that_was_asked_for(codegraft: Any, fake: Any) -> None:
    fake.scripts["WatchSource"] = [
        [
            source(source_pb2.SOURCE_STATE_READY, 2, 1),  # ready, but with the files of the sync before
            source(source_pb2.SOURCE_STATE_FETCHING, 2, 1),
            source(source_pb2.SOURCE_STATE_READY, 2, 2, file_count=7),
            hang,
        ]
    ]
    found = await codegraft.call(lambda c: c.sources.wait(SOURCE))
    assert found.file_count == 7
    await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_a_source_that_cannot_be_fetched_raises_why(codegraft: Any, fake: Any) -> None:
    failure = Failure(reason="SOURCE_UNREACHABLE", message="no route to host")
    fake.scripts["WatchSource"] = [[source(source_pb2.SOURCE_STATE_FAILED, 1, 1, failure=failure)]]
    with pytest.raises(errors.SourceUnreachable):
        await codegraft.call(lambda c: c.sources.wait(SOURCE))


async def test_a_source_that_is_removed_meanwhile_is_told(codegraft: Any, fake: Any) -> None:
    fake.scripts["WatchSource"] = [[source(source_pb2.SOURCE_STATE_PENDING, 1, 0)]]
    fake.scripts["GetSource"] = [errors.SourceNotFound("gone")]
    with pytest.raises(errors.SourceNotFound):
        await codegraft.call(lambda c: c.sources.wait(SOURCE))


# --- completions ------------------------------------------------------------------------------------------------

STARTED = pb.CompleteResponse(started=pb.Started(model="m", adapter_sha256="ab"))
FINISHED = pb.CompleteResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))


def delta(text: str) -> pb.CompleteResponse:
    return pb.CompleteResponse(delta=pb.Delta(text=text, tokens=1))


async def test_a_completion_comes_in_typed_pieces(codegraft: Any, fake: Any) -> None:
    fake.scripts["Complete"] = [[STARTED, delta("def "), delta("f"), FINISHED]]
    pieces = await codegraft.take(
        lambda c: c.completions.complete("p", prefix="a", suffix="b", path="x.py", max_tokens=5, stop=["\n\n"])
    )
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == "def f"
    assert pieces[0].started.adapter_sha256 == "ab"
    assert pieces[-1].finished.reason == pb.FINISH_REASON_STOP
    assert [bool(piece.started) for piece in pieces] == [True, False, False, False]
    (request,) = fake.requests["Complete"]
    assert (request.prompt.prefix, request.prompt.suffix, request.prompt.path) == ("a", "b", "x.py")
    assert (request.stop.max_tokens, list(request.stop.strings)) == (5, ["\n\n"])


async def test_what_is_left_unset_stays_the_services_choice(codegraft: Any, fake: Any) -> None:
    await codegraft.take(lambda c: c.completions.complete("p", prefix="a"))
    (request,) = fake.requests["Complete"]
    assert not request.stop.HasField("max_tokens")
    assert not request.HasField("sampling")
    assert not request.HasField("adapter")


@pytest.mark.usefixtures("hasty")
async def test_a_completion_is_never_repeated(codegraft: Any, fake: Any) -> None:
    fake.scripts["Complete"] = [[STARTED, delta("a"), errors.Unavailable("broke")]]
    with pytest.raises(errors.Unavailable):
        await codegraft.take(lambda c: c.completions.complete("p", prefix="a"))
    fake.scripts["Complete"] = [[errors.QueueFull("full", retry_after=0.01)]]
    with pytest.raises(errors.QueueFull):
        await codegraft.take(lambda c: c.completions.complete("p", prefix="a"))
    assert fake.count("Complete") == 2


async def test_a_completion_that_is_dropped_stops_the_generation(codegraft: Any, fake: Any) -> None:
    fake.scripts["Complete"] = [[STARTED, delta("a"), hang]]
    assert len(await codegraft.take(lambda c: c.completions.complete("p", prefix="a"), 2)) == 2
    gc.collect()
    await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_cancelling_from_another_thread_ends_the_loop(fake: Any, address: str) -> None:
    fake.scripts["Complete"] = [[STARTED, delta("a"), hang]]
    pieces: list[Piece] = []

    def read(client: Codegraft) -> None:
        stream = client.completions.complete("p", prefix="a")
        for piece in stream:
            pieces.append(piece)
            if piece.text:
                threading.Timer(0.1, stream.cancel).start()
        assert list(stream) == []

    with Codegraft(Addresses(address, address, address, address)) as client:
        began = time.monotonic()
        await asyncio.to_thread(read, client)
        assert time.monotonic() - began < 5
    assert [piece.text for piece in pieces] == ["", "a"]
    await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_cancelling_the_stream_ends_the_loop_and_not_its_reader(fake: Any, address: str) -> None:
    fake.scripts["Complete"] = [[STARTED, delta("a"), hang]]
    async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
        stream, texts = client.completions.complete("p", prefix="a"), []
        async for piece in stream:
            texts.append(piece.text)
            if piece.text:
                asyncio.get_running_loop().call_later(0.1, stream.cancel)
        assert texts == ["", "a"] and [piece async for piece in stream] == []
    await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_cancelling_the_reader_cancels_both(fake: Any, address: str) -> None:
    fake.scripts["Complete"] = [[STARTED, hang]]
    async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in client.completions.complete("p", prefix="a"):
                begun.set()

        reading = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), 20)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_closing_the_client_ends_a_stream_with_an_error(fake: Any, address: str) -> None:
    fake.scripts["Complete"] = [[STARTED, hang]]
    client = AsyncCodegraft(Addresses(address, address, address, address))
    stream = client.completions.complete("p", prefix="a")
    await anext(stream)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.1)
    await client.close()
    with pytest.raises(errors.Cancelled):
        await asyncio.wait_for(reading, 5)


async def test_a_completions_deadline_is_its_own(codegraft: Any, fake: Any) -> None:
    seen = []
    fake.scripts["Complete"] = [[lambda _: seen.append(fake.remaining["Complete"][-1]) or FINISHED]]
    await codegraft.take(lambda c: c.completions.complete("p", prefix="a"))
    await codegraft.take(lambda c: c.completions.complete("p", prefix="a", timeout=30))
    assert seen[0] is None and 20 < seen[1] < 31


async def test_chat_comes_in_the_same_pieces(codegraft: Any, fake: Any) -> None:
    fake.scripts["Chat"] = [[pb.ChatResponse(delta=pb.Delta(text="hi")), pb.ChatResponse(finished=pb.Finished())]]
    pieces = await codegraft.take(lambda c: c.completions.chat("p", [pb.ChatMessage(content="hello")]))
    assert [piece.text for piece in pieces] == ["hi", ""]
    assert fake.requests["Chat"][0].messages[0].content == "hello"
