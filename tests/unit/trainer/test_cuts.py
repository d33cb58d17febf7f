"""Where middles are cut out: in each language whole pieces of syntax, lines, and characters."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from services.trainer.corpus import cuts, syntax

SOURCES = {
    "Python": "class A:\n    def f(self, x):\n        return [y * 2 for y in g(x, key=1)]\n",
    "JavaScript": "function f(x) {\n  return x.map((y) => y * 2);\n}\n",
    "JSX": "const A = () => <B c={d(1, 2)} />;\n",
    "TypeScript": "function f(x: number[]): number {\n  return g(x, 2);\n}\n",
    "TSX": "const A = (p: P) => <B c={d(1, 2)} />;\n",
    "Java": "class A {\n  int f(int x) {\n    return g(x, 2);\n  }\n}\n",
    "Go": "package a\n\nfunc f(x int) int {\n\treturn g(x, 2)\n}\n",
    "C": "int f(int x) {\n  return g(x, 2);\n}\n",
    "C++": "template <class T> T f(T x) {\n  return g(x, 2);\n}\n",
    "C#": "class A {\n  int F(int x) {\n    return G(x, 2);\n  }\n}\n",
    "Rust": "fn f(x: i32) -> i32 {\n    g(x, 2)\n}\n",
    "Ruby": "def f(x)\n  g(x, 2)\nend\n",
    "PHP": "<?php\nfunction f($x) {\n  return g($x, 2);\n}\n",
    "Kotlin": "fun f(x: Int): Int {\n  return g(x, 2)\n}\n",
    "Scala": "object A {\n  def f(x: Int): Int = g(x, 2)\n}\n",
    "Swift": "func f(x: Int) -> Int {\n  return g(x, 2)\n}\n",
    "Shell": 'f() {\n  echo "$1" | grep a\n}\n',
    "Lua": "function f(x)\n  return g(x, 2)\nend\n",
}
CALLS = ("g(", "G(", "d(1, 2)", "x.map", "grep a")


def test_every_grammar_is_tried() -> None:
    assert set(SOURCES) == syntax.LANGUAGES


@pytest.mark.parametrize("language", SOURCES)
def test_nodes_are_whole_pieces_of_syntax(language: str) -> None:
    text = SOURCES[language]
    tree = syntax.parse(language, text)
    assert tree is not None
    place = next(text.index(call) for call in CALLS if call in text)
    nodes = [text[first:second] for first, second in tree.nodes_at(place, 0, len(text))]
    assert len(nodes) >= 2, "an expression, and what it is part of"
    for inner, outer in pairwise(nodes):
        assert inner in outer and len(inner) < len(outer) < len(text)
    for node in nodes:
        assert all(node.count(opening) == node.count(closing) for opening, closing in ("()", "[]", "{}"))


def test_places_are_characters_not_bytes() -> None:
    text = "# é☺\nwörter = f('ä', g(1))\n"
    tree = syntax.parse("Python", text)
    assert tree is not None
    nodes = [text[first:second] for first, second in tree.nodes_at(text.index("g("), 0, len(text))]
    assert nodes[0] == "g(1)" and "f('ä', g(1))" in nodes


def test_nothing_with_an_error_inside_and_nothing_beyond_the_part() -> None:
    text = "a = f(1)\nb = (]\nc = g(h(2))\n"
    tree = syntax.parse("Python", text)
    assert tree is not None
    for place in range(len(text)):
        assert not any("(]" in text[first:second] for first, second in tree.nodes_at(place, 0, len(text)))
    at = text.index("h(2)")
    assert [text[slice(*node)] for node in tree.nodes_at(at, at - 2, at + 5)] == ["h(2)", "(h(2))"]


def test_a_language_without_grammar_has_no_tree() -> None:
    assert syntax.parse("COBOL", "x") is None and syntax.parse("", "x") is None
    assert syntax.parse("Python", "x\n" * 600_000) is None


def test_a_third_each() -> None:
    text = "".join(f"def function_{n}(left, right):\n    return [left, other(right, {n})]\n\n" for n in range(40))
    tree = syntax.parse("Python", text)
    assert tree is not None
    start, end = text.index("def function_3("), text.index("def function_30(")
    every_node = {node for place in range(start, end) for node in tree.nodes_at(place, start, end)}
    rng, kinds = random.Random(0), Counter[str]()
    for _ in range(3000):
        first, second = cuts.draw(text, start, end, tree, rng)
        assert start <= first <= second <= end
        ends_a_line = text[second : second + 1] == "\n"
        kinds["syntax" if (first, second) in every_node else "lines" if ends_a_line else "characters"] += 1
    assert kinds["characters"] == pytest.approx(1000, rel=0.1)  # a few of them happen to end a line
    assert 800 < kinds["syntax"] < 1300  # a few lines are nodes too


def test_without_a_tree_lines_take_the_place_of_syntax() -> None:
    text = "".join(f"    line {n}\n" for n in range(50))
    rng = random.Random(0)
    drawn = [cuts.draw(text, 0, len(text), None, rng) for _ in range(1000)]
    lines = [(first, second) for first, second in drawn if text[second : second + 1] == "\n"]
    assert len(lines) == pytest.approx(700, rel=0.1)
    assert sum("\n" not in text[first:second] for first, second in lines) > 0.4 * len(lines)
    assert sum(text[:first].endswith("\n    ") for first, second in lines) > 0.4 * len(lines)


def test_drawn_from_the_generator_alone() -> None:
    text, tree = SOURCES["Python"], syntax.parse("Python", SOURCES["Python"])
    one, other = ([cuts.draw(text, 0, len(text), tree, random.Random(n)) for n in range(50)] for _ in range(2))
    assert one == other and len(set(one)) > 20


@pytest.mark.parametrize("text", ["x", "\n", "é", "   ", "a\r\nb", "(((("])
def test_any_text_can_be_cut(text: str) -> None:
    tree = syntax.parse("Python", text)
    for seed in range(50):
        first, second = cuts.draw(text, 0, len(text), tree, random.Random(seed))
        assert 0 <= first <= second <= len(text)
