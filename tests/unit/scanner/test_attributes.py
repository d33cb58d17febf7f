""".gitattributes: git itself says which lines match, and linguist what they mean."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.core.masks import Masks
from services.scanner import stage1
from services.scanner.attributes import Attributes
from services.scanner.languages import Traits
from services.scanner.rules import Rules
from services.scanner.stage1 import SourceMasks
from services.scanner.verdict import Reason

CODE = b"def area(width, height):\n    return width * height\n"
PLAIN = Traits("Python", False, False)


def reasons(path: str, **texts: str) -> list[Reason]:
    attributes = Attributes({name.replace("__", "/") + ".gitattributes": text for name, text in texts.items()})
    masks = SourceMasks(Masks([]), Masks([]), Masks([]), attributes)
    return [finding.reason for finding in stage1.examine(path, CODE, Rules(), masks, size=len(CODE)).findings]


@pytest.mark.parametrize(
    ("line", "path", "expected"),
    [
        ("*.py linguist-generated", "a/b.py", [Reason.GENERATED]),
        ("*.py linguist-generated=true\na/*.py -linguist-generated", "a/b.py", []),
        ("*.py linguist-generated\na/*.py !linguist-generated", "a/b.py", []),
        ("/gen/** linguist-generated=true", "gen/x/b.py", [Reason.GENERATED]),
        ("gen linguist-generated", "gen/b.py", []),
        ("third/** linguist-vendored", "third/b.py", [Reason.VENDORED]),
        ("vendor/** linguist-vendored=false", "vendor/b.py", []),
        ("*.py linguist-detectable=false", "b.py", [Reason.NOT_CODE]),
        ("*.py linguist-language=Markdown", "b.py", [Reason.NOT_CODE]),
        ("*.py linguist-language=Nonsense", "b.py", [Reason.NOT_CODE]),
        ('"a b.py" linguist-generated', "a b.py", [Reason.GENERATED]),
    ],
)
def test_overrides(line: str, path: str, expected: list[Reason]) -> None:
    assert reasons(path, **{"": line}) == expected


def test_a_file_nearer_to_the_code_has_the_last_word() -> None:
    assert reasons("src/b.py", **{"": "*.py linguist-generated", "src__": "*.py -linguist-generated"}) == []
    assert reasons("src/b.py", **{"": "*.py -linguist-generated", "src__": "b.py linguist-generated"}) == [
        Reason.GENERATED
    ]
    assert reasons("b.py", src__="b.py linguist-generated") == []


PARTS = st.sampled_from(["a", "b", "*", "?", "**", "*.py", "a*", "[ab]", "[!a]", "x.py"])
PATTERNS = st.builds(
    lambda parts, start: start + "/".join(parts), st.lists(PARTS, min_size=1, max_size=3), st.sampled_from(["", "/"])
)
PATHS = ["a", "x.py", "b.py", "a/x.py", "b/a", "a/b/x.py", "b/b/b", "a/b/a/x.py", "ab/x.py"]


@settings(max_examples=60, deadline=None)
@example(lines=[("/**", True)])
@given(lines=st.lists(st.tuples(PATTERNS, st.booleans()), min_size=1, max_size=3))
def test_the_same_lines_match_as_in_git(
    lines: list[tuple[str, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = tmp_path_factory.mktemp("repo")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    text = "".join(f"{pattern} {'' if on else '-'}linguist-generated\n" for pattern, on in lines)
    (folder / ".gitattributes").write_text(text)
    command = ["git", "-C", str(folder), "check-attr", "-z", "linguist-generated", "--", *PATHS]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[2::3]
    found = Attributes({".gitattributes": text})
    ours = [found.apply(path, PLAIN).generated for path in PATHS]
    assert ours == [word == "set" for word in told], text
