"""Which addresses may be fetched from."""

from __future__ import annotations

import pytest

from services.core.errors import InvalidArgument
from services.ingest.sources.guard import Guard


@pytest.mark.parametrize(
    ("entry", "url", "admitted"),
    [
        ("https://good.example", "https://good.example/app.git", True),
        ("https://good.example/", "https://GOOD.example:443/app.git", True),
        ("https://good.example", "https://good.example.evil.org/app.git", False),
        ("https://good.example", "https://good.example@evil.org/app.git", False),
        ("https://good.example", "http://good.example/app.git", False),
        ("https://good.example", "https://good.example:8443/app.git", False),
        ("https://good.example/team", "https://good.example/team/app.git", True),
        ("https://good.example/team", "https://good.example/team", True),
        ("https://good.example/team", "https://good.example/teams/app.git", False),
        ("https://good.example/team", "https://good.example/team/../other.git", False),
        ("https://good.example/team", "https://good.example/team/%2e%2e/other.git", False),
        ("https://good.example/team", "https://good.example/team/link/../app.git", False),  # a link may lead elsewhere
        ("ssh://git@good.example", "ssh://git@good.example:22/app.git", True),
        ("ssh://git@good.example", "ssh://root@good.example/app.git", False),
        ("good.example", "https://good.example/app.git", False),
        ("", "https://good.example/app.git", False),
    ],
)
def test_an_entry_admits_what_lies_below_it_and_nothing_that_looks_like_it(
    entry: str, url: str, admitted: bool
) -> None:
    assert Guard(urls=[entry]).admits(url) is admitted


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1"),
        *("[::1]", "[::]", "[fe80::1]", "[fd00::1]", "[ff02::1]", "224.0.0.1", "2130706433", "0x7f000001"),
        *("[::ffff:127.0.0.1]", "[::ffff:169.254.169.254]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
    ],
)
def test_addresses_inside_the_house_are_refused_in_every_spelling(host: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Guard().resolve(f"https://{host}/x", "url.url")
    assert caught.value.field == "url.url"
    assert "CODEGRAFT_INGEST_ALLOWED" in caught.value.hint


def test_an_allowed_network_opens_just_its_addresses() -> None:
    guard = Guard(networks=["10.1.0.0/16"])
    assert guard.resolve("https://10.1.2.3/x", "url.url") == "10.1.2.3"
    with pytest.raises(InvalidArgument):
        guard.resolve("https://10.2.0.1/x", "url.url")


def test_a_public_address_needs_no_entry() -> None:
    assert Guard().resolve("https://1.1.1.1/x", "url.url") == "1.1.1.1"
