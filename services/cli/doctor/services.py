"""The services: whether they answer, of which release they are, and whether they let anybody in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from codegraft.access.v1 import access_pb2 as pb
from codegraft.access.v1 import access_pb2_grpc
from services.cli.control.installation import Installation
from services.cli.doctor.check import Check, failed, ok, warning
from services.core.config import CoreSettings
from services.core.errors import CodegraftError, Unauthenticated, Unavailable
from services.core.rpc import context
from services.core.rpc.client import channel
from services.core.rpc.status import from_rpc
from services.core.version import release

NAMES = ("ingest", "scanner", "trainer", "inference")
_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Told:
    """What a service says of itself with its health."""

    problem: str = ""
    """Why it does not serve; empty when it does."""
    version: str = ""
    """Empty: it is older than this word."""
    time: float = 0.0
    """Its clock, in seconds since 1970; 0 when it does not tell."""
    before: float = 0.0
    """Our clock when we asked."""
    after: float = 0.0
    """Our clock when it had answered."""


async def told(place: Installation) -> dict[str, Told]:
    """What every service says, by its name."""
    answers = await asyncio.gather(*(_ask(place.settings, name) for name in NAMES))
    return dict(zip(NAMES, answers, strict=True))


async def _ask(settings: CoreSettings, name: str) -> Told:
    before = time.time()
    try:
        async with channel(getattr(settings, f"{name}_address"), settings) as opened:
            call = opened.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=HealthCheckRequest.SerializeToString,
                response_deserializer=HealthCheckResponse.FromString,
            )(HealthCheckRequest(), timeout=_TIMEOUT)
            metadata = {key: str(value) for key, value in await call.initial_metadata()}
            after = time.time()  # it tells its clock before anything else
            answer = await call
    except grpc.aio.AioRpcError as error:
        return Told(problem=from_rpc(error).message)
    except CodegraftError as error:
        return Told(problem=error.message)
    serving = answer.status == HealthCheckResponse.SERVING
    return Told(
        "" if serving else "does not serve now",
        metadata.get(context.VERSION, ""),
        float(metadata.get(context.TIME, 0)),
        before,
        after,
    )


def check(place: Installation, found: Mapping[str, Told]) -> list[Check]:
    """Whether each serves."""
    checks = []
    for name, one in found.items():
        address = getattr(place.settings, f"{name}_address")
        if one.problem:
            hint = f"See its log, or correct CODEGRAFT_{name.upper()}_ADDRESS."
            checks.append(failed(f"{name} service", f"{address}: {one.problem}", hint))
        else:
            checks.append(ok(f"{name} service", f"serves on {address}"))
    return checks


def versions(found: Mapping[str, Told]) -> dict[str, str]:
    """The release of every service that serves."""
    return {name: one.version or "one before 0.1.0" for name, one in found.items() if not one.problem}


def judge(versions: Mapping[str, str], mine: str = "") -> list[Check]:
    """One check of the services' releases, and one of this command's against them."""
    if not versions:
        return []
    mine = mine or release()
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    kinds = sorted(set(versions.values()))
    if len(kinds) == 1:
        checks = [ok("versions", f"all services are {kinds[0]}")]
    elif all(_near(one, other) for one in kinds for other in kinds):
        checks = [
            warning("versions", listed, "Finish the upgrade: all services together, one minor version at a time.")
        ]
    else:
        checks = [
            failed("versions", listed, "More than one minor version apart: bring all to the newest one's release.")
        ]
    if all(_near(mine, version) for version in kinds):
        return checks
    return [*checks, warning("this command", f"is {mine}; {listed}", "Install the services' release of it.")]


def _near(one: str, other: str) -> bool:
    """Whether releases are at most one minor version apart."""
    if one == other:
        return True
    try:
        (major, minor), (its_major, its_minor) = ([int(part) for part in v.split(".")[:2]] for v in (one, other))
    except ValueError:
        return False
    return major == its_major and abs(minor - its_minor) <= 1


async def check_access(place: Installation) -> list[Check]:
    """Whether our key is known, and whether a caller without one is refused."""
    settings = place.settings
    checks = []
    if settings.api_key.get_secret_value():
        try:
            caller = await _caller(settings)
            role = pb.Role.Name(caller.role).removeprefix("ROLE_").lower()
            checks.append(ok("API key", f"{caller.subject}: {role}"))
        except CodegraftError as error:
            checks.append(failed("API key", error.message, error.hint or "Make another one with codegraft key create."))
    try:
        await _caller(settings.model_copy(update={"api_key": type(settings.api_key)("")}))
        checks.append(
            failed("authentication", "anybody is let in", "Set CODEGRAFT_AUTH=on at every service, and restart them.")
        )
    except Unauthenticated:
        checks.append(ok("authentication", "a caller without a key is refused"))
    except Unavailable:
        pass  # told before
    except CodegraftError as error:
        checks.append(warning("authentication", f"not to be seen: {error.message}", "Look at ingest's log."))
    return checks


async def _caller(settings: CoreSettings) -> pb.GetCallerResponse:
    try:
        async with channel(settings.ingest_address, settings) as opened:
            stub = access_pb2_grpc.AccessServiceStub(opened)
            answer: pb.GetCallerResponse = await stub.GetCaller(pb.GetCallerRequest(), timeout=_TIMEOUT)
            return answer
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None
