"""The server runner as a real process: what a supervisor, a load balancer and a caller see of its life."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.core import errors
from services.core.rpc.status import from_rpc

SERVER = Path(__file__).with_name("rpc_process.py")
NAME = "test.Slow"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Process:
    """A running server, its log read as it comes."""

    popen: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            if line.startswith("{"):
                with self.arrived:
                    self.lines.append(json.loads(line))
                    self.arrived.notify_all()

    def line(self, event: str) -> dict[str, Any]:
        with self.arrived:
            assert self.arrived.wait_for(lambda: any(line["event"] == event for line in self.lines), 30), self.lines
            return next(line for line in self.lines if line["event"] == event)

    @property
    def address(self) -> str:
        return str(self.line("serving")["address"])

    def signal(self, number: int) -> None:
        os.kill(self.popen.pid, number)

    def end(self, seconds: float) -> int:
        return self.popen.wait(seconds)


@contextmanager
def running(**settings: object) -> Iterator[Process]:
    environment = os.environ | {f"CODEGRAFT_{key.upper()}": str(value) for key, value in settings.items()}
    popen = subprocess.Popen([sys.executable, str(SERVER)], env=environment, stderr=subprocess.PIPE, text=True)
    process = Process(popen)
    reader = threading.Thread(target=process.read)
    reader.start()
    try:
        yield process
    finally:
        popen.kill()
        popen.wait()
        reader.join()


def health(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)


def call(channel: grpc.Channel, method: str) -> Callable[..., Any]:
    return channel.unary_stream(f"/{NAME}/{method}")


def test_it_serves_health_by_service_and_reflection_on_a_port_it_names() -> None:
    with running() as process, grpc.insecure_channel(process.address) as channel:
        assert health(channel) == health(channel, NAME) == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health(channel, "of.nobody")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=5)
        services = {service.name for service in answer.list_services_response.service}
        assert {NAME, "grpc.health.v1.Health"} <= services
        assert process.line("serving")["services"] == [NAME]


def test_a_service_that_is_not_quick_yet_is_called_but_not_balanced_to() -> None:
    with running(test_serving_after=1) as process, grpc.insecure_channel(process.address) as channel:
        assert (health(channel), health(channel, NAME)) == (SERVING, NOT_SERVING)
        assert channel.unary_unary(f"/{NAME}/Second")(b"", timeout=20) == b"done"
        process.line("serving at last")
        assert health(channel, NAME) == SERVING
        process.signal(signal.SIGTERM)
        assert process.end(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_and_well(number: int) -> None:
    with running(drain_seconds=20) as process:
        process.line("serving")
        began = time.monotonic()
        process.signal(number)
        assert process.end(10) == 0
        assert time.monotonic() - began < 10
        process.line("background ended")  # it could clean up
        process.line("stopped")


def test_draining_says_so_lets_streams_end_and_takes_no_new_calls() -> None:
    with running(drain_seconds=20) as process, grpc.insecure_channel(process.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert next(watching).status == SERVING
        stream = call(channel, "Twenty")(b"")  # two seconds
        received = [next(stream)]
        unary = channel.unary_unary(f"/{NAME}/Second").future(b"")
        assert unary.initial_metadata(), "it has been let in"
        process.signal(signal.SIGTERM)
        assert next(watching).status == NOT_SERVING

        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                channel.unary_unary(f"/{NAME}/Second")(b"", timeout=10)
            except grpc.RpcError as refused:
                assert refused.code() == grpc.StatusCode.UNAVAILABLE
                assert type(from_rpc(refused)) is errors.Unavailable
                break
        else:
            pytest.fail("new calls were still answered")

        assert unary.result(10) == b"done"
        received += list(stream)
        assert received == [b"%d" % number for number in range(20)]
        assert process.end(10) == 0


def test_watches_do_not_hold_up_the_end() -> None:
    with running(drain_seconds=20) as process, grpc.insecure_channel(process.address) as channel:
        watching = call(channel, "WatchForEver")(b"")
        next(watching)
        healthy = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(healthy)
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(watching)
        assert type(from_rpc(caught.value)) is errors.ShuttingDown
        assert process.end(10) == 0
        assert time.monotonic() - began < 10


def test_a_stream_longer_than_the_drain_is_cut_off_in_time() -> None:
    with running(drain_seconds=1) as process, grpc.insecure_channel(process.address) as channel:
        stream = call(channel, "ForEver")(b"")
        next(stream)
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert isinstance(from_rpc(caught.value), errors.Unavailable | errors.Cancelled)
        assert process.end(10) == 0
        assert 0.9 < time.monotonic() - began < 10


def test_who_insists_with_ctrl_c_does_not_wait() -> None:
    with running(drain_seconds=30) as process, grpc.insecure_channel(process.address) as channel:
        stream = call(channel, "ForEver")(b"")
        next(stream)
        process.signal(signal.SIGTERM)
        process.line("draining")
        process.signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.popen.poll() is None
        process.signal(signal.SIGINT)
        assert process.end(15) == 130


def test_background_work_that_fails_ends_the_process_with_its_reason() -> None:
    with running(test_background="fail") as process:
        assert process.end(20) == 1
        line = process.line("cannot run")
        assert (line["reason"], line["error"]) == ("STATE_UNAVAILABLE", "the background broke")


def test_background_work_that_is_done_leaves_the_server_running() -> None:
    with running(test_background="return") as process, grpc.insecure_channel(process.address) as channel:
        time.sleep(0.3)
        assert health(channel) == SERVING
        process.signal(signal.SIGTERM)
        assert process.end(10) == 0


def test_a_port_that_is_taken_is_named_without_a_stack_trace() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with running(listen=listen) as process:
            assert process.end(20) == 1
            line = process.line("cannot run")
            assert line["reason"] == "UNAVAILABLE"
            assert listen in line["error"]
            assert line["field"] == "CODEGRAFT_LISTEN"
            assert "exception" not in line


def test_a_message_over_the_limit_is_refused_and_the_server_lives_on() -> None:
    with running() as process, grpc.insecure_channel(process.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{NAME}/Second")(b"x" * (5 << 20), timeout=10)
        assert type(from_rpc(caught.value)) is errors.ResourceExhausted
        assert channel.unary_unary(f"/{NAME}/Second")(b"x" * (3 << 20), timeout=10) == b"done"
