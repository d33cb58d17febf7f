"""Secrets: what is found, what is not, and what stands in a file instead.

No secret is written down here: each is put together when the tests run, of random characters and of pieces of the marks
by which scanners know them.
"""

from __future__ import annotations

import base64
import json
import random
import string
import sysconfig
import uuid
import zlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from codegraft.scanner.v1.scan_pb2 import SECRET_POLICY_IGNORE, SECRET_POLICY_REDACT, SECRET_POLICY_REJECT
from services.core.masks import Masks
from services.core.store import Place
from services.scanner import local, pipeline
from services.scanner.rules import Rules
from services.scanner.secrets import TOO_SLOW, Finder, Secret, finder
from services.scanner.snapshot import File
from services.scanner.stage1 import SourceMasks

CHOSEN = random.Random(7)
LETTERS = string.ascii_letters + string.digits
HEXADECIMAL = "0123456789abcdef"
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
CODE = "def area(width, height):\n    return width * height\n\n\n"
MAX_FALSE_ALARMS = 0.005


def pick(count: int, characters: str = LETTERS) -> str:
    return "".join(CHOSEN.choice(characters) for _ in range(count))


def checked(mark: str) -> str:
    """A token that ends in its own check sum, as GitHub and npm make them."""
    body, rest, digits = pick(30), 0, ""
    rest = zlib.crc32(body.encode())
    while rest:
        rest, digit = divmod(rest, 62)
        digits = BASE62[digit] + digits
    return mark + body + digits.rjust(6, "0")


def web_token() -> str:
    parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": pick(8), "iat": 1760000000}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
    return ".".join([*encoded, pick(43, LETTERS + "-_")])


def private_key() -> str:
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.PrivateFormat.OpenSSH
    return key.private_bytes(serialization.Encoding.PEM, pem, serialization.NoEncryption()).decode()


AMAZON = ("AK" + "IA" + pick(16, string.ascii_uppercase + "234567"), pick(40, LETTERS + "+/"))
PLANTED = {
    "aws": (f'aws_access_key_id = "{AMAZON[0]}"\naws_secret_access_key = "{AMAZON[1]}"\n', AMAZON[1]),
    "github": ('TOKEN = "{}"\n', checked("gh" + "p_")),
    "gitlab": ("GITLAB_TOKEN={}\n", "glp" + "at-" + pick(20)),
    "slack": ('slack = "{}"\n', "xo" + f"xb-{pick(12, string.digits)}-{pick(13, string.digits)}-{pick(24)}"),
    "stripe": ('stripe.api_key = "{}"\n', "sk_" + "live_" + pick(24)),
    "google": ('KEY = "{}"\n', "AI" + "za" + pick(35, LETTERS + "-_")),
    "openai": ('client = OpenAI(api_key="{}")\n', "s" + f"k-{pick(20)}T3Blbk" + f"FJ{pick(20)}"),
    "npm": ("//registry.npmjs.org/:_authToken={}\n", checked("np" + "m_")),
    "pypi": ("password = {}\n", "py" + "pi-AgEIcHlwaS5vcmc" + pick(150, LETTERS + "-_")),
    "private key": ("{}", private_key()),
    "web token": ('headers = {{"Authorization": "Bearer {}"}}\n', web_token()),
    "url": ('DATABASE_URL = "postgres://app:{}@db.internal.corp.net:5432/app"\n', pick(14)),
    "yaml": ("database:\n  user: app\n  password: {}\n", pick(10) + "!" + pick(4)),
    "api key": ('api_key = "{}"\n', pick(32)),
    "twilio": ("TWILIO_ACCOUNT_SID=AC" + pick(32, HEXADECIMAL) + "\nTWILIO_AUTH_TOKEN={}\n", pick(32, HEXADECIMAL)),
}
LOOKALIKES = {
    "uuid": f'id = "{uuid.uuid5(uuid.NAMESPACE_DNS, "a")}"\nreset_token_id = "{uuid.uuid5(uuid.NAMESPACE_DNS, "b")}"\n',
    "digest": f'key_sha256 = "{pick(64, HEXADECIMAL)}"\nrevision = "{pick(40, HEXADECIMAL)}"\n',
    "example": 'aws_access_key_id = "AKIAIOSFODNN7EXAMPLE"\nsecret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"\n',
    "public key": f"-----BEGIN PUBLIC KEY-----\n{pick(64)}\n{pick(56)}\n-----END PUBLIC KEY-----\n",
    "placeholder": 'password = os.environ["DB_PASSWORD"]\napi_key: ${API_KEY}\ntoken = "<your-token>"\n',
}


def planted(kind: str) -> tuple[str, str]:
    """A file with a secret, and the secret."""
    template, value = PLANTED[kind]
    return CODE + (template if value in template else template.format(value)), value


@pytest.fixture(scope="session")
def found_by(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    return finder(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_planted_is_found_where_it_stands(kind: str, found_by: Finder) -> None:
    text, value = planted(kind)
    assert any(
        value.strip() in text[one.start : one.end] or text[one.start : one.end] in value for one in found_by.find(text)
    )
    lines = {one.line for one in found_by.find(text)}
    assert text[: text.index(value)].count("\n") + 1 in lines


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_only_looks_like_one_is_none(kind: str, found_by: Finder) -> None:
    assert found_by.find(CODE + LOOKALIKES[kind]) == []


def test_real_code_raises_few_alarms(found_by: Finder) -> None:
    installed = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))[::20]
    texts = [path.read_text(errors="replace") for path in installed if path.stat().st_size <= 512 * 1024]
    assert len(texts) > 400
    assert sum(bool(found_by.find(text)) for text in texts) <= MAX_FALSE_ALARMS * len(texts)


@pytest.mark.parametrize("kind", PLANTED)
def test_nothing_is_left_after_redacting(kind: str, found_by: Finder) -> None:
    text, value = planted(kind)
    redacted = found_by.redacted(text + text)
    assert value.strip() not in redacted and found_by.find(redacted) == []
    assert redacted.count("<redacted:") >= 2
    assert redacted.startswith(CODE)


def test_positions_are_of_characters_and_every_copy_counts(found_by: Finder) -> None:
    _, value = planted("github")
    text = f"# grüße, 世界 🎉\na = '{value}'\r\nunnamed('{value}')\n"
    assert [(one.line, text[one.start : one.end]) for one in found_by.find(text)] == [(2, value), (3, value)]


def test_what_nobody_can_look_through_is_no_text_to_train_on(found_by: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.scanner.secrets.MAX_SECONDS", 1e-9)
    text = CODE * 3000
    assert found_by.find(text) == [Secret(TOO_SLOW, 1, 0, len(text))]


def judged(text: str, rules: Rules, found_by: Finder | None, force: tuple[str, ...] = ()) -> pipeline.Entry:
    data = text.encode()
    listed = File("s", "a.py", len(data), "0" * 64, "AUTO", Place("", 0))
    entry, kept = pipeline.examine(
        listed, data, rules, SourceMasks(Masks(rules.exclude), Masks([]), Masks(force)), found_by
    )
    assert kept.startswith(CODE)
    return entry


def test_a_file_with_a_secret_is_rejected_and_the_secret_is_told_to_nobody(found_by: Finder) -> None:
    text, value = planted("github")
    entry = judged(text, Rules(secrets=SECRET_POLICY_REJECT), found_by)
    assert [(one.reason.name, one.detail) for one in entry.findings] == [("SECRET", "github-pat in line 5")]
    assert value not in repr(entry)


def test_or_taken_without_it(found_by: Finder) -> None:
    text, value = planted("github")
    entry = judged(text, Rules(secrets=SECRET_POLICY_REDACT), found_by)
    assert entry.is_clean and entry.redacted == "github-pat in line 5"
    assert entry.text_sha256 != entry.file.sha256  # the loss of another text
    other, _ = planted("gitlab")
    assert judged(other, Rules(secrets=SECRET_POLICY_REDACT), found_by).text_sha256 != entry.text_sha256
    (verdict,) = pipeline.conclude([entry], Rules())
    assert (verdict.accepted, verdict.reason, verdict.detail) == (True, "ACCEPTED", "redacted: github-pat in line 5")
    assert value not in repr(entry)


def test_forcing_a_file_in_takes_it_without_its_secrets(found_by: Finder) -> None:
    entry = judged(planted("github")[0], Rules(secrets=SECRET_POLICY_REJECT), found_by, force=("*.py",))
    assert entry.is_clean and entry.redacted


def test_only_who_asks_for_it_trains_on_secrets() -> None:
    entry = judged(planted("github")[0], Rules(secrets=SECRET_POLICY_IGNORE), None)
    assert entry.is_clean and not entry.redacted
    assert Rules().secrets == SECRET_POLICY_REJECT


def test_many_secrets_are_told_in_short(found_by: Finder) -> None:
    text = CODE + "".join(f'token{number} = "{checked("gh" + "p_")}"\n' for number in range(9))
    (finding,) = judged(text, Rules(), found_by).findings
    assert finding.detail.endswith("github-pat in line 9 and 4 more")


def test_a_dry_run_tells_them_too(tmp_path: Path, found_by: Finder) -> None:
    text, value = planted("yaml")
    (tmp_path / "deploy.yaml").write_text(text)
    (tmp_path / "a.py").write_text(planted("url")[0])
    found = {one.verdict.path: one.verdict for one in local.scan(tmp_path, Rules(), found_by)}
    assert found["a.py"].reason == "SECRET"
    assert found["deploy.yaml"].reasons == ("NOT_CODE", "SECRET")
    assert value not in repr(found)
