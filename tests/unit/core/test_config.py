"""Settings: environment over file, and errors that name the variable and keep secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.core import config
from services.core.config import CoreSettings
from services.core.errors import InvalidArgument


class ScannerSettings(CoreSettings):
    scanner_max_file_bytes: int = 1024


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(config.PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "codegraft.toml"
    monkeypatch.setenv("CODEGRAFT_CONFIG", str(path))
    return path


def test_defaults_need_no_environment() -> None:
    settings = config.load(CoreSettings)
    assert settings.listen == "127.0.0.1:0"
    assert settings.cache_dir == Path.home() / ".cache/codegraft"


def test_environment_over_file_over_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('s3_bucket = "from-file"\ndrain_seconds = 3\nscanner_max_file_bytes = 7\nother_service = 1\n')
    monkeypatch.setenv("CODEGRAFT_S3_BUCKET", "from-environment")
    settings = config.load(ScannerSettings)
    assert (settings.s3_bucket, settings.drain_seconds, settings.scanner_max_file_bytes) == ("from-environment", 3, 7)
    assert settings.s3_endpoint == "127.0.0.1:9000"


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEGRAFT_NATS_PASSWORD", "hush-hush")
    monkeypatch.setenv("CODEGRAFT_S3_SECRET_KEY", "hush-hush")
    settings = config.load(CoreSettings)
    assert settings.nats_password.get_secret_value() == "hush-hush"
    assert "hush" not in repr(settings) + str(settings) + settings.model_dump_json()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CODEGRAFT_DRAIN_SECONDS", "soon", "number"),
        ("CODEGRAFT_DRAIN_SECONDS", "-1", "greater than or equal to 0"),
        ("CODEGRAFT_STARTUP_TIMEOUT_SECONDS", "0", "greater than 0"),
        ("CODEGRAFT_LOG_LEVEL", "chatty", "'debug'"),
        ("CODEGRAFT_LISTEN", "localhost", "host:port"),
        ("CODEGRAFT_LISTEN", "0.0.0.0:70000", "host:port"),
        ("CODEGRAFT_S3_ENDPOINT", "http://localhost:9000", "without scheme"),
        ("CODEGRAFT_S3_BUCKET", "Not_A_Bucket", "pattern"),
        ("CODEGRAFT_S3_SECURE", "perhaps", "boolean"),
    ],
)
def test_a_bad_value_is_named(variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgument, match=message) as raised:
        config.load(CoreSettings)
    assert raised.value.field == variable
    assert variable in raised.value.hint


def test_an_endpoint_with_credentials_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEGRAFT_S3_ENDPOINT", "me:hush-hush@localhost:9000")
    with pytest.raises(InvalidArgument) as raised:
        config.load(CoreSettings)
    assert "hush" not in raised.value.message + raised.value.hint
    assert raised.value.__cause__ is None


def test_a_bad_value_in_the_file_names_the_file(file: Path) -> None:
    file.write_text('listen = "nowhere"')
    with pytest.raises(InvalidArgument) as raised:
        config.load(CoreSettings)
    assert str(file) in raised.value.hint


def test_a_missing_file(file: Path) -> None:
    with pytest.raises(InvalidArgument, match="not there") as raised:
        config.load(CoreSettings)
    assert raised.value.field == "CODEGRAFT_CONFIG"


@pytest.mark.parametrize("content", [b"listen = ", b"\xff\xfe"])
def test_a_file_that_is_no_toml(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(InvalidArgument, match="not valid TOML"):
        config.load(CoreSettings)


@pytest.mark.parametrize("level", ["INFO", "Info", "info"])
def test_log_levels_in_any_case(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEGRAFT_LOG_LEVEL", level)
    assert config.load(CoreSettings).log_level == "info"
