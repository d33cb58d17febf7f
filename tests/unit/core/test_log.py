"""Log lines: JSON, with the request they belong to, and without secrets however they come in."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from pydantic import SecretStr

from services.core import log

SECRET = "s3cr3t-of-the-house"


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    log._hidden.discard(SECRET)


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    log.configure("scanner", "info")
    return Lines(capsys)


class Lines:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.text = ""

    def read(self) -> list[dict[str, object]]:
        out, self.text = self._capsys.readouterr()
        assert out == "", "stdout belongs to programs' results"
        return [json.loads(line) for line in self.text.splitlines()]


def test_a_line_is_one_json_object(lines: Lines) -> None:
    log.get("services.scanner.stage1").info("file\nrejected", path="a.py", tokens=3, share=0.5, names=["a", "b"])
    [line] = lines.read()
    assert line["event"] == "file\nrejected"
    assert line["service"] == "scanner"
    assert line["level"] == "info"
    assert line["logger"] == "services.scanner.stage1"
    assert str(line["timestamp"]).endswith("Z")
    assert (line["path"], line["tokens"], line["share"], line["names"]) == ("a.py", 3, 0.5, ["a", "b"])


def test_lines_below_the_level_are_left_out(lines: Lines) -> None:
    log.get("x").debug("quiet")
    logging.getLogger("x").debug("quiet")
    assert lines.read() == []


def test_lines_of_libraries_have_the_same_form(lines: Lines) -> None:
    with log.bound(request_id="r-1"):
        logging.getLogger("some.library").warning("took %d ms", 5)
    [line] = lines.read()
    assert (line["event"], line["logger"], line["request_id"], line["service"]) == (
        "took 5 ms",
        "some.library",
        "r-1",
        "scanner",
    )


async def test_the_request_id_is_in_lines_of_its_own_task_only(lines: Lines) -> None:
    async def handle(request: str) -> None:
        with log.bound(request_id=request, trace_id="t" + request):
            await asyncio.sleep(0)
            assert log.request_id() == request
            log.get("x").info("handled", wanted=request)

    await asyncio.gather(*(handle(str(i)) for i in range(5)))
    log.get("x").info("outside")
    assert log.request_id() == ""
    *handled, outside = lines.read()
    assert all(line["request_id"] == line["wanted"] and line["trace_id"] == f"t{line['wanted']}" for line in handled)
    assert len(handled) == 5
    assert "request_id" not in outside


@pytest.mark.parametrize(
    "key",
    ["password", "nats_password", "S3_SECRET_KEY", "secret", "access_key", "api-key", "Authorization", "access_token"],
)
def test_values_of_secret_keys(lines: Lines, key: str) -> None:
    log.get("x").info("event", **{key: SECRET}, inner={key: SECRET, "list": [{key: SECRET}]})
    [line] = lines.read()
    assert line[key] == log.REDACTED
    assert SECRET not in lines.text


def test_ordinary_keys_keep_their_values(lines: Lines) -> None:
    log.get("x").info("event", tokens=7, page_token="abc", key="blobs/x", secret_count=2, secrets_found=1)
    [line] = lines.read()
    assert [line[key] for key in ("tokens", "page_token", "key", "secret_count", "secrets_found")] == [
        7,
        "abc",
        "blobs/x",
        2,
        1,
    ]


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/repo.git",
        f"clone of https://{SECRET}@host/x failed",
        f"nats://:{SECRET}@h:4222,nats://u:{SECRET}@h:4223",
        f"Authorization: Bearer {SECRET}",
        f"authorization: basic {SECRET}",
        f"https://s3/bucket/key?X-Amz-Algorithm=AWS4&X-Amz-Signature={SECRET}&X-Amz-Expires=60",
        f"GET /x?a=1&access_token={SECRET} HTTP/1.1",
        f"key cg_local-1_{SECRET}{'x' * 43}",
    ],
)
def test_secrets_inside_of_text(lines: Lines, text: str) -> None:
    log.get("x").info(text, error=text, inner=[text])
    logging.getLogger("y").warning("%s", text)
    assert len(lines.read()) == 2
    assert SECRET not in lines.text


def test_hidden_values_never_appear(lines: Lines) -> None:
    log.hide(SecretStr(SECRET), "")
    log.get("x").info(
        "plain", value=f"a{SECRET}b", data=SECRET.encode(), error=ValueError(SECRET), other=SecretStr("q")
    )
    try:
        raise RuntimeError(f"refused {SECRET}")
    except RuntimeError:
        log.get("x").exception("failed")
        logging.getLogger("y").exception("failed")
    plain, *failed = lines.read()
    assert SECRET not in lines.text
    assert plain["value"] == f"a{log.REDACTED}b"
    assert all("RuntimeError: refused" in str(line["exception"]) for line in failed)


def test_local_variables_stay_out_of_traces(lines: Lines) -> None:
    local_value = "only-a-local-value"
    try:
        raise RuntimeError("failed with " + str(len(local_value)))
    except RuntimeError:
        log.get("x").exception("failed")
    lines.read()
    assert lines.text.count("only-a-local-value") == 0


def test_configuring_twice_does_not_double_lines(lines: Lines) -> None:
    log.configure("trainer", "info")
    log.get("x").info("once")
    [line] = lines.read()
    assert line["service"] == "trainer"
