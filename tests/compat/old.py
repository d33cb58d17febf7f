"""The contract as it was: messages and calls made of a frozen image, without any code generated from it.

``codegraft-2026-11-24.binpb`` is protos/codegraft.binpb of that day. Take a newer one beside it when a release is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor

IMAGE = Path(__file__).with_name("codegraft-2026-11-24.binpb")


def _pool() -> tuple[descriptor_pool.DescriptorPool, dict[str, MethodDescriptor]]:
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(IMAGE.read_bytes()).file
    for file in files:  # each behind those that it imports
        pool.Add(file)
    services = [pool.FindServiceByName(f"{file.package}.{one.name}") for file in files for one in file.service]
    return pool, {f"/{service.full_name}/{method.name}": method for service in services for method in service.methods}


POOL, METHODS = _pool()


def message(name: str, /, **fields: Any) -> Any:
    """A message of the old contract, by its name behind ``codegraft.``."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"codegraft.{name}"))(**fields)


def call(channel: grpc.aio.Channel, method: str) -> Any:
    """An old client's call, by its name behind ``/codegraft.``."""
    described = METHODS[f"/codegraft.{method}"]
    made = {
        (False, False): channel.unary_unary,
        (True, False): channel.stream_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }[described.client_streaming, described.server_streaming]
    answer = message_factory.GetMessageClass(described.output_type)
    return made(
        f"/codegraft.{method}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=answer.FromString,
    )


class OldServer(grpc.GenericRpcHandler):
    """A server of the old contract: what it does not know it refuses as gRPC does.

    Args:
        answers: by the method's name behind ``/codegraft.``: makes the answer of the request; of a stream, all of them.
    """

    def __init__(self, answers: dict[str, Callable[[Any], Any]]) -> None:
        self._answers = answers

    def service(self, details: Any) -> Any:
        described = METHODS.get(details.method)
        if described is None:
            return None
        answer = self._answers[details.method.removeprefix("/codegraft.")]

        def unary(request: Any, context: Any) -> Any:
            return answer(request)

        def stream(request: Any, context: Any) -> Iterator[Any]:
            yield from answer(request)

        make = (
            grpc.unary_stream_rpc_method_handler if described.server_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(
            stream if described.server_streaming else unary,
            request_deserializer=message_factory.GetMessageClass(described.input_type).FromString,
            response_serializer=lambda response: response.SerializeToString(),
        )
