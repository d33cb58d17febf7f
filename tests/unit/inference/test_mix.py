"""Adapters mixed in a step against each one's own product."""

from __future__ import annotations

import random

import torch

from services.inference.adapters.lora import Segment, Weights, prepare, siblings
from services.inference.adapters.mix import Mixer, Shape

PATHS = ("a.q_proj", "a.k_proj", "a.v_proj")
GROUPS = {PATHS: Shape(32, (24, 8, 8)), ("a.o_proj",): Shape(24, (32,))}


def adapter(seed: int, rank: int, paths: tuple[str, ...] = (*PATHS, "a.o_proj")) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {path: (out, s.width) for group, s in GROUPS.items() for path, out in zip(group, s.outs, strict=True)}
    pairs = {
        path: (
            torch.randn(rank, shapes[path][1], generator=generator),
            torch.randn(shapes[path][0], rank, generator=generator),
        )
        for path in paths
    }
    return prepare(pairs, 1.0, torch.float32, torch.device("cpu"), sha256=str(seed))


def check(mixer: Mixer, segments: list[Segment], tokens: int) -> None:
    mix = mixer.mix(segments)
    for paths, shape in GROUPS.items():
        x = torch.randn(tokens, shape.width)
        y = torch.zeros(tokens, sum(shape.outs))
        wanted = y.clone()
        for segment in segments:
            begin = 0
            for path, out in zip(paths, shape.outs, strict=True):
                if path in segment.weights.layers:
                    a, b = segment.weights.layers[path]
                    span = slice(segment.begin, segment.end)
                    wanted[span, begin : begin + out] += x[span] @ a.T @ b.T
                begin += out
        mix.add(paths, x, y, shape.outs)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_any_mix_over_many_steps_gives_each_token_its_own_adapter() -> None:
    rng, mixer = random.Random(3), Mixer(GROUPS)
    known = [adapter(seed, rng.choice((2, 8, 9, 16, 64, 70))) for seed in range(30)]
    known += [adapter(99, 8, ("a.v_proj",)), adapter(98, 8, ("a.o_proj",))]
    for _ in range(150):
        segments, at = list[Segment](), 0
        for weights in rng.sample(known, rng.randint(1, 14)):
            at += rng.randint(0, 1)  # tokens of the base model between
            count = rng.choice((1, 1, 1, 2, 5, 20))
            segments.append(Segment(at, at + count, weights))
            at += count
        check(mixer, segments, at + 1)


def test_the_same_adapter_in_two_objects_and_places() -> None:
    mixer = Mixer(GROUPS)
    segments = [Segment(0, 2, adapter(1, 4)), Segment(3, 4, adapter(1, 4)), Segment(4, 7, adapter(2, 4))]
    check(mixer, segments, 8)


def test_decodes_on_different_adapters_are_stacked_and_one_alone_is_not() -> None:
    mixer, known = Mixer(GROUPS), [adapter(seed, 16) for seed in range(8)]
    mixed = mixer.mix([Segment(n, n + 1, weights) for n, weights in enumerate(known)])
    assert (len(mixed.alone), len(mixed.stacked)) == (0, 1)
    one = mixer.mix([Segment(0, 8, known[0])])
    assert (len(one.alone), len(one.stacked)) == (1, 0)


def test_a_step_in_the_order_of_the_slots_gathers_nothing() -> None:
    mixer, known = Mixer(GROUPS), [adapter(seed, 16) for seed in range(8)]
    mixer.mix([Segment(n, n + 1, weights) for n, weights in enumerate(known)])
    ordered = sorted(known[::-1], key=mixer.order)
    segments = [Segment(n + 2, n + 3, weights) for n, weights in enumerate(ordered)]
    assert mixer.mix(segments).stacked[0].span == slice(2, 10)
    assert mixer.order(None) < mixer.order(known[0])
    check(mixer, segments, 11)


def test_layers_with_the_same_input_are_found_by_their_names() -> None:
    paths = ["0.q_proj", "0.k_proj", "0.v_proj", "0.o_proj", "0.gate_proj", "0.up_proj", "0.down_proj", "1.up_proj"]
    assert siblings(paths) == [
        ("0.q_proj", "0.k_proj", "0.v_proj"),
        ("0.o_proj",),
        ("0.gate_proj", "0.up_proj"),
        ("0.down_proj",),
        ("1.up_proj",),
    ]
