"""Every RPC of the contract with its rule of the policy, and requests that name what one likes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2  # noqa: F401  # registers its service
from grpc_reflection.v1alpha import reflection_pb2  # noqa: F401

import codegraft
from services.core.auth.policy import POLICY


def methods() -> dict[str, MethodDescriptor]:
    """Every RPC that the contract has, and those of health and reflection."""
    root = next(iter(codegraft.__path__))
    files = [
        importlib.import_module(".".join(["codegraft", *path.relative_to(root).with_suffix("").parts])).DESCRIPTOR
        for path in sorted(Path(root).rglob("*_pb2.py"))
    ]
    pool = descriptor_pool.Default()
    services = [service for file in files for service in file.services_by_name.values()]
    services += [pool.FindServiceByName(name) for name in POLICY if name.startswith("grpc.")]
    return {f"/{service.full_name}/{method.name}": method for service in services for method in service.methods}


METHODS = methods()
RULES = {f"/{service}/{name}": rule for service, rules in POLICY.items() for name, rule in rules.items()}
NAMED = {method: rule for method, rule in RULES.items() if rule.fields}


def request(method: str, values: dict[str, str]) -> Any:
    """The request of the method with these fields."""
    made = message_factory.GetMessageClass(METHODS[method].input_type)()
    for path, value in values.items():
        holder, (*parts, last) = made, path.split(".")
        for part in parts:
            holder = getattr(holder, part)
        setattr(holder, last, value)
    return made


def named(method: str, project: str, path: str, below: str = "") -> dict[str, str]:
    """The field of that path, naming something of the project."""
    if path.startswith("projects/{"):
        return {path.removeprefix("projects/{").removesuffix("}"): project.removeprefix("projects/")}
    return {path: project + below}
