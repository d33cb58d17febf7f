"""Adapters mixed in a step against each one's own product."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from services.inference.adapters import stack
from services.inference.adapters.lora import Active, Segment, Weights, prepare, siblings
from services.inference.adapters.mix import Mixer
from services.inference.adapters.stack import Shape

PATHS = ("a.q_proj", "a.k_proj", "a.v_proj")
GROUPS = {PATHS: Shape(32, (24, 8, 8)), ("a.o_proj",): Shape(24, (32,))}


def adapter(
    seed: int, rank: int, paths: tuple[str, ...] = (*PATHS, "a.o_proj"), dtype: torch.dtype = torch.float32
) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {path: (out, s.width) for group, s in GROUPS.items() for path, out in zip(group, s.outs, strict=True)}
    pairs = {
        path: (
            torch.randn(rank, shapes[path][1], generator=generator),
            torch.randn(shapes[path][0], rank, generator=generator),
        )
        for path in paths
    }
    return prepare(pairs, 1.0, dtype, torch.device("cpu"), sha256=str(seed))


@torch.inference_mode()  # as steps are
def check(mixer: Mixer, segments: list[Segment], tokens: int) -> None:
    mixed = mixer.mix(segments)
    for paths, shape in GROUPS.items():
        x = torch.randn(tokens, shape.width)
        y = torch.zeros(tokens, sum(shape.outs))
        wanted = y.clone()
        for segment in segments:
            begin = 0
            for path, out in zip(paths, shape.outs, strict=True):
                if path in segment.weights.layers:
                    a, b = (part.to(segment.weights.dtype).float() for part in segment.weights.layers[path])
                    span = slice(segment.begin, segment.end)
                    wanted[span, begin : begin + out] += x[span] @ a.T @ b.T
                begin += out
        mixed.add(paths, x, y, shape.outs)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("compiled", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_any_mix_over_many_steps_gives_each_token_its_own_adapter(compiled: bool, dtype: torch.dtype) -> None:
    rng, mixer = random.Random(3), Mixer(GROUPS, compiled=compiled)
    known = [adapter(seed, rng.choice((2, 8, 9, 16, 64, 70)), dtype=dtype) for seed in range(30)]
    known += [adapter(99, 8, ("a.v_proj",), dtype), adapter(98, 8, ("a.o_proj",), dtype)]
    for _ in range(150):
        segments, at = list[Segment](), 0
        for weights in rng.sample(known, rng.randint(1, 14)):
            at += rng.randint(0, 1)  # tokens of the base model between
            count = rng.choice((1, 1, 1, 2, 5, 20))
            segments.append(Segment(at, at + count, weights))
            at += count
        check(mixer, segments, at + 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_adapter_in_two_objects_and_places(compiled: bool) -> None:
    mixer = Mixer(GROUPS, compiled=compiled)
    segments = [Segment(0, 2, adapter(1, 4)), Segment(3, 4, adapter(1, 4)), Segment(4, 7, adapter(2, 4))]
    check(mixer, segments, 8)


def test_decodes_on_different_adapters_are_stacked_and_one_alone_is_not() -> None:
    mixer, known = Mixer(GROUPS, compiled=False), [adapter(seed, 16) for seed in range(8)]
    mixed = mixer.mix([Segment(n, n + 1, weights) for n, weights in enumerate(known)])
    assert (len(mixed.alone), len(mixed.stacked)) == (0, 1)
    one = mixer.mix([Segment(0, 8, known[0])])
    assert (len(one.alone), len(one.stacked)) == (1, 0)


def test_on_a_cpu_all_that_lie_in_stacks_are_placed() -> None:
    mixer, known = Mixer(GROUPS), [adapter(seed, rank) for seed, rank in enumerate((16, 16, 8))]
    for weights in known:
        mixer.stage(weights)
    mixed = mixer.mix([Segment(0, 2, known[0]), Segment(2, 20, known[1]), Segment(20, 21, known[2])])
    assert not mixed.alone and [placed.slots.tolist().count(-1) for placed in mixed.stacked] == [0, 20]


def test_steps_on_one_of_sixteen_staged_adapters_each_copy_none(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, known = Mixer(GROUPS), [adapter(seed, 16) for seed in range(16)]
    for weights in known:
        mixer.stage(weights)
    monkeypatch.setattr(stack, "_fill", lambda *_: pytest.fail("a step has copied an adapter"))
    for weights in known:
        check(mixer, [Segment(0, 2, weights)], 3)


def test_a_step_in_the_order_of_the_slots_gathers_nothing() -> None:
    mixer, known = Mixer(GROUPS, compiled=False), [adapter(seed, 16) for seed in range(8)]
    mixer.mix([Segment(n, n + 1, weights) for n, weights in enumerate(known)])
    ordered = sorted(known[::-1], key=mixer.order)
    segments = [Segment(n + 2, n + 3, weights) for n, weights in enumerate(ordered)]
    assert mixer.mix(segments).stacked[0].span == slice(2, 10)
    assert mixer.order(None) < mixer.order(known[0])
    check(mixer, segments, 11)


def test_what_is_staged_beside_the_steps_costs_no_step_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, known = Mixer(GROUPS), [adapter(seed, 16) for seed in range(2)]
    for weights in known:
        mixer.stage(weights)
    monkeypatch.setattr(stack, "_fill", lambda *_: pytest.fail("a step has copied an adapter"))
    check(mixer, [Segment(0, 1, known[0]), Segment(1, 2, known[1])], 3)


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_stay_right_while_other_adapters_are_staged(compiled: bool) -> None:
    rng, mixer, done = random.Random(5), Mixer(GROUPS, compiled=compiled), threading.Event()
    known, others = ([adapter(seed, 16) for seed in seeds] for seeds in (range(20), range(20, 40)))
    staged = list[int]()

    def stage() -> None:
        while not done.is_set():
            mixer.stage(others[len(staged) % len(others)])
            staged.append(1)

    thread = threading.Thread(target=stage)
    thread.start()
    try:
        for count in [1, 2, 8, 9, 16, 18] * 10:  # the stack grows under both, and each takes the other's slots
            weights = rng.sample(known, count)
            check(mixer, [Segment(n, n + 1, one) for n, one in enumerate(weights)], count)
    finally:
        done.set()
        thread.join()
    assert len(staged) > 2


def test_what_is_tried_beside_the_steps_keeps_its_slot_whatever_they_mix() -> None:
    mixer, tried = Mixer(GROUPS), adapter(99, 16)
    active = Active(mixer)
    with active.beside(Segment(1, 3, tried)):
        for seed in range(0, 40, 8):  # each would take the slot of the one unmixed for longest
            check(mixer, [Segment(n, n + 1, adapter(seed + n, 16)) for n in range(8)], 8)
        for paths, shape in GROUPS.items():
            x, y = torch.randn(4, shape.width), torch.zeros(4, sum(shape.outs))
            assert active.mix is not None
            active.mix.add(paths, x, y, shape.outs)
            wanted = [x[1:3] @ a.T @ b.T for a, b in (tried.layers[path] for path in paths)]
            torch.testing.assert_close(y[1:3], torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)
            assert not y[0].any() and not y[3].any(), "tokens of the base model"
    assert active.mix is None


def test_layers_with_the_same_input_are_found_by_their_names() -> None:
    paths = ["0.q_proj", "0.k_proj", "0.v_proj", "0.o_proj", "0.gate_proj", "0.up_proj", "0.down_proj", "1.up_proj"]
    assert siblings(paths) == [
        ("0.q_proj", "0.k_proj", "0.v_proj"),
        ("0.o_proj",),
        ("0.gate_proj", "0.up_proj"),
        ("0.down_proj",),
        ("1.up_proj",),
    ]
