"""Whether a service answers grpc.health.v1, asked from outside as any load balancer would."""

from __future__ import annotations

from datetime import timedelta

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

SERVING = "serving"
UNREACHABLE = "unreachable"


def check(address: str, timeout: timedelta = timedelta(seconds=2)) -> str:
    """The server's health as a word: ``serving``, ``not_serving``, ``unreachable`` …

    Args:
        address: host:port of a gRPC server without TLS.
        timeout: how long to wait for the connection and the answer together.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(  # the generated stub has no types
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        try:
            answer = call(HealthCheckRequest(), timeout=timeout.total_seconds())
        except grpc.RpcError as error:
            code = error.code()
            unreached = code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
            return UNREACHABLE if unreached else str(code.name).lower()
    return HealthCheckResponse.ServingStatus.Name(answer.status).lower()
