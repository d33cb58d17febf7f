"""The whole way, from a repository to a swapped adapter: the real stack, the real model, a client nobody here wrote."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e import editors
from tests.e2e.conftest import CODEGRAFT

HERE = Path(__file__).parent
SERVICES = ("ingest", "scanner", "trainer", "inference")
PACKAGE_FILES = ["signer.py", "time.py", "tagging.py", "select.py", "retention.py", "error.py", "lifecycleconfig.py"]


def package() -> Path:
    spec = find_spec("minio")
    assert spec and spec.origin
    return Path(spec.origin).parent


def make_bundle(folder: Path) -> Path:
    """A git repository with real code and with one file for each reason of stage 1."""
    repo = folder / "repo"
    repo.mkdir()
    for name in ("versioningconfig.py", "sse.py"):
        (repo / name).write_text((package() / name).read_text())
    (repo / "copy.py").write_text((package() / "sse.py").read_text())
    (repo / "binary.py").write_bytes(b"\x00\x01\x02" * 500)
    (repo / "large.py").write_text("value = 1\n" * 60_000)
    (repo / "digits.py").write_text("table = [\n" + "    1234567890, 9876543210,\n" * 40 + "]\n")
    (repo / "notes.txt").write_text("Nothing to run here, only a few words for people.\n" * 5)
    git = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    subprocess.run([*git, "bundle", "create", "-q", str(folder / "repo.bundle"), "--all"], check=True)
    return folder / "repo.bundle"


def make_archive(folder: Path) -> Path:
    with tarfile.open(folder / "package.tar.gz", "w:gz") as archive:
        for name in PACKAGE_FILES:
            archive.add(package() / name, f"minio/{name}")
        archive.add(package() / "xml.py", "minio/masked.py")
        archive.add(package() / "commonconfig.py", "minio/commonconfig.py")  # the held-out file, once more
    return folder / "package.tar.gz"


@pytest.fixture(scope="module")
def seen(stack: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the foreign client saw on its way."""
    folder = tmp_path_factory.mktemp("client")
    config = {
        "addresses": {name: stack[name] for name in SERVICES},
        "bundle": str(make_bundle(folder)),
        "archive": str(make_archive(folder)),
        "held_out": str(package() / "commonconfig.py"),
        "key": stack["key"],
        "out": str(folder / "seen.json"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    client = subprocess.run(
        [sys.executable, "-P", str(HERE / "foreign_client.py"), str(folder / "config.json")],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    print(client.stdout)
    assert client.returncode == 0, client.stdout + client.stderr
    result: dict[str, Any] = json.loads(Path(config["out"]).read_text())
    return result


pytestmark = pytest.mark.timeout(900)


def test_create_is_idempotent(seen: dict[str, Any]) -> None:
    assert seen["create_is_idempotent"]


@pytest.mark.parametrize(
    ("mistake", "code", "reason"),
    [
        ("unknown project", "NOT_FOUND", "PROJECT_NOT_FOUND"),
        ("bad name", "INVALID_ARGUMENT", "INVALID_NAME"),
        ("negative page size", "INVALID_ARGUMENT", "INVALID_PAGE_SIZE"),
        ("unknown source", "NOT_FOUND", "SOURCE_NOT_FOUND"),
        ("bad git url", "INVALID_ARGUMENT", "INVALID_GIT_URL"),
        ("unknown snapshot", "NOT_FOUND", "SNAPSHOT_NOT_FOUND"),
        ("no dataset", "FAILED_PRECONDITION", "NO_DATASET"),
        ("empty prompt", "INVALID_ARGUMENT", "EMPTY_PROMPT"),
    ],
)
def test_mistakes_get_their_reason(seen: dict[str, Any], mistake: str, code: str, reason: str) -> None:
    assert seen["bad_input"][mistake] == [code, reason]


def test_all_kinds_of_source_are_ready(seen: dict[str, Any]) -> None:
    sources = seen["sources"]
    assert {name: source["state"] for name, source in sources.items()} == dict.fromkeys(
        ("repo", "package", "held-out"), "SOURCE_STATE_READY"
    ), sources
    assert len(sources["repo"]["commit"]) == 40
    assert [sources[name]["files"] for name in ("repo", "package", "held-out")] == [7, len(PACKAGE_FILES) + 2, 1]


def test_snapshot_is_the_same_again(seen: dict[str, Any]) -> None:
    assert seen["snapshot"] == {"files": 17, "same_again": True}


def test_scan_gives_every_file_one_verdict(seen: dict[str, Any]) -> None:
    scan = seen["scan"]
    assert scan["state"] == "JOB_STATE_SUCCEEDED", scan["failure"]
    assert scan["accepted"] + scan["rejected"] == scan["files"] == len(scan["verdicts"]) == 17


def test_planted_files_are_rejected_for_their_reason(seen: dict[str, Any]) -> None:
    verdicts = seen["scan"]["verdicts"]
    wanted = {
        "repo:binary.py": "NOT_TEXT",
        "repo:large.py": "TOO_LARGE",
        "repo:digits.py": "LOTS_OF_DIGITS",
        "repo:notes.txt": "NOT_CODE",
        "package:minio/masked.py": "EXCLUDED_BY_MASK",
        "package:minio/commonconfig.py": "DUPLICATE",
    }
    assert {path: verdicts[path]["reason"] for path in wanted} == wanted
    copies = sorted(verdicts[f"repo:{name}"]["reason"] for name in ("copy.py", "sse.py"))
    assert copies == ["ACCEPTED", "DUPLICATE"]


def test_accepted_files_have_a_loss_and_a_part(seen: dict[str, Any]) -> None:
    accepted = [v for v in seen["scan"]["verdicts"].values() if v["reason"] == "ACCEPTED"]
    assert accepted and all(0.3 < v["loss"] < 3.0 for v in accepted)
    assert seen["scan"]["verdicts"]["held-out:commonconfig.py"]["split"] == "SPLIT_TEST"
    train = {v["sha256"] for v in accepted if v["split"] == "SPLIT_TRAIN"}
    test = {v["sha256"] for v in accepted if v["split"] == "SPLIT_TEST"}
    assert train and test and not train & test


def test_run_beats_the_base_model_and_tells_its_story(seen: dict[str, Any]) -> None:
    run = seen["run"]
    assert run["state"] == "JOB_STATE_SUCCEEDED", run["failure"]
    assert run["best_test_loss"] < run["base_test_loss"]
    assert [sequence for sequence, _ in run["events"]] == list(range(1, len(run["events"]) + 1))
    assert {"plan", "step", "evaluation", "checkpoint", "best", "state"} <= {kind for _, kind in run["events"]}


def test_streams_survive_the_swap_on_the_version_they_named(seen: dict[str, Any]) -> None:
    streams = seen["streams"]
    assert streams and all(stream["finished"] for stream in streams), streams
    assert streams[0]["sha256"] == ""
    versions = [stream["sha256"] for stream in streams]
    assert set(versions) <= {"", *seen["run"]["bests"]}
    order = ["", *seen["run"]["bests"]]
    assert [order.index(v) for v in versions] == sorted(order.index(v) for v in versions), "never back to an older one"


def test_policies_choose_the_version(seen: dict[str, Any]) -> None:
    serve, best = seen["serve"], seen["run"]["bests"][-1]
    answered = {name: completion["sha256"] for name, completion in serve.items()}
    assert answered == {"latest": best, "again": best, "off": "", "pinned": best, "base_asked_for": ""}
    assert serve["latest"]["text"] == serve["again"]["text"] == serve["pinned"]["text"]
    assert serve["off"]["text"] == serve["base_asked_for"]["text"]


def test_a_bad_pin_is_refused_and_the_old_version_serves(seen: dict[str, Any]) -> None:
    assert seen["bad_pin"] == ["NOT_FOUND", "CHECKPOINT_NOT_FOUND"]
    assert seen["after_bad_pin"] == seen["run"]["bests"][-1]


async def test_an_editor_gets_the_new_adapter_over_http(stack: dict[str, str], seen: dict[str, Any]) -> None:
    url, best = f"http://{stack['gateway']}", seen["run"]["bests"][-1]
    asked = await asyncio.to_thread(editors.ask_blocking, url, stack["key"], "demo")
    again = await editors.ask_without_blocking(url, stack["key"], "demo")
    assert asked["text"] == asked["streamed"] == again["text"] and asked["text"].strip()
    assert asked["usage"] == again["usage"] == 16
    assert asked["fingerprints"] == [f"smollm2-135m+{best}", "smollm2-135m+base"]
    assert {"smollm2-135m", "demo", "demo@base"} < set(asked["models"]) and len(asked["models"]) > 3
    assert asked["errors"] == {
        "no such model": ["NotFoundError", "PROJECT_NOT_FOUND"],
        "nothing to complete": ["BadRequestError", "EMPTY_PROMPT"],
        "no such key": ["AuthenticationError", "UNAUTHENTICATED"],
    }
    assert asked["chat"] == ["The capital of France is Paris.", "stop"], "an instruct model, by its chat template"
    assert again["adapter"] == best and again["infill"]["tokens_predicted"] > 0
    async with httpx2.AsyncClient(base_url=url, headers=editors.bearer(stack["key"])) as http:
        for event in ("shown", "accepted"):
            told = {"completion_id": asked["id"], "event": event, "accepted_characters": 9, "model": "demo"}
            assert (await http.post("/v1/feedback", json=told)).json() == {"recorded": True}
    environment = {**os.environ, **{f"CODEGRAFT_{name.upper()}_ADDRESS": stack[name] for name in SERVICES}}
    environment["CODEGRAFT_API_KEY"] = stack["key"]
    command = [*CODEGRAFT, "acceptance", "-p", "demo", "--json"]
    counted = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    (entry,) = json.loads(counted.stdout)["adapters"]
    assert (entry["adapter_sha256"], entry["accepted"], entry["accepted_characters"]) == (best, "1", "9")


def test_code_in_editors_is_stored_only_where_a_project_says_so(stack: dict[str, str]) -> None:
    data = Path(stack["data"])
    environment = {**os.environ, "CODEGRAFT_DATA": str(data)}

    def codegraft(*arguments: str, key: str = "", expect: int = 0) -> str:
        own = {**environment, "CODEGRAFT_API_KEY": key} if key else environment
        done = subprocess.run(
            [*CODEGRAFT, *arguments], env=own, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    def has(path: Path, marker: str) -> bool:
        with contextlib.suppress(FileNotFoundError):  # the servers' files come and go
            return path.is_file() and marker.encode() in path.read_bytes()
        return False

    def lies(marker: str) -> set[str]:
        files = (Path(folder, name) for folder, _, names in os.walk(data) for name in names)
        return {path.relative_to(data).parts[0] for path in files if has(path, marker)}

    codegraft("project", "create", "quiet")
    editor = json.loads(codegraft("key", "create", "ed", "--role", "completer", "-p", "quiet", "--json"))["secret"]
    maker = json.loads(codegraft("key", "create", "maker", "--role", "contributor", "-p", "quiet", "--json"))["secret"]
    other = json.loads(codegraft("key", "create", "else", "--role", "operator", "-p", "demo", "--json"))["secret"]
    with httpx2.Client(base_url=f"http://{stack['gateway']}", headers=editors.bearer(editor), timeout=60) as http:

        def write(marker: str) -> str:
            asked = {"model": "quiet", "prompt": f"# {marker}\nx = ", "suffix": f"\n# {marker}", "max_tokens": 4}
            answer = http.post("/v1/completions", json=asked)
            assert answer.status_code == 200, answer.text
            for event in ("shown", "accepted"):
                told = {"completion_id": answer.json()["id"], "event": event, "text": marker, "model": "quiet"}
                assert http.post("/v1/feedback", json=told).json() == {"recorded": True}
            return str(answer.json()["id"])

        write("marker-5e1f-of-a-quiet-project")
        assert lies("marker-5e1f") == set(), "neither NATS nor S3 nor any log has it"
        codegraft("project", "set", "quiet", "--keep-completions", key=maker, expect=6)
        codegraft("project", "set", "quiet", "--keep-completions")
        kept = write("marker-77aa-of-one-that-keeps")
        assert lies("marker-77aa") == {"nats"}
    (line,) = codegraft("completions", "list", "--json", "-p", "quiet").splitlines()
    found = json.loads(line)
    assert found["completion_id"] == kept.removeprefix("cmpl-") and found["event"] == "ACCEPTED"
    assert found["shown"] == found["accepted"] == "marker-77aa-of-one-that-keeps"
    for key in (editor, maker, other):
        codegraft("completions", "list", "--json", "-p", "quiet", key=key, expect=6)
    assert "keep_completions" in codegraft("audit", "-p", "quiet", "--changes", "--json")
    codegraft("completions", "delete", "-p", "quiet", "--yes")
    assert codegraft("completions", "list", "--json", "-p", "quiet") == ""
    codegraft("project", "set", "quiet", "--no-keep-completions")
