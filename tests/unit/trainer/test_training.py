"""The parts that compute: loss, packing, accumulation, the loop, resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from services.core import errors
from services.core.models import prompts
from services.trainer import checkpoint, loop
from services.trainer.corpus.data import Corpus, Document, Row, pack
from services.trainer.model.lora import Trainee
from services.trainer.model.loss import CHUNK, IGNORED, summed_loss, token_losses
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut
from services.trainer.state import State
from services.trainer.story import CheckpointDue, Evaluated, StepDone
from tests.processors import without_bfloat16

Make = Callable[..., Any]


def row(ids: list[int]) -> Row:
    return Row(ids[:-1], ids[1:], list(range(len(ids) - 1)))


def gradients(trainee: Trainee) -> dict[str, torch.Tensor]:
    trainee.take_gradients()
    return {name: master.grad.clone() for name, master in trainee.masters.items() if master.grad is not None}


def stir(trainee: Trainee) -> None:
    """Moves B away from zero, so that A gets gradients too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for master in trainee.masters.values():
            master.add_(torch.randn(master.shape, generator=generator) * 0.05)
    trainee.publish()


# --- loss ---


@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 37])
def test_chunked_loss_is_the_plain_one_with_its_gradient(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(97, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 97, (tokens,), generator=generator)
    labels[::5] = IGNORED
    hidden = torch.randn(tokens, 16, generator=generator, dtype=torch.float64)
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    total = summed_loss(ours, head, labels)
    (3 * total).backward()
    expected = functional.cross_entropy(plain @ head.T, labels, ignore_index=IGNORED, reduction="sum")
    (3 * expected).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-5)
    each = token_losses(hidden, head, labels)
    assert each.sum().item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert each[labels == IGNORED].abs().sum() == 0


# --- packing ---


def test_packed_documents_do_not_see_each_other(settings: Make, trainee: Make) -> None:
    documents = [[5, 9, 11, 70, 3, 8, 21], [44, 2, 17, 90], [9, 9, 60, 61, 62, 63, 64, 65, 66]]
    made = trainee(settings())
    stir(made)
    (packed,) = pack(iter(documents), 64)
    assert packed.positions.count(0) == 3
    together = made.losses([packed])[0]
    apart = torch.cat([made.losses([row(ids)])[0] for ids in documents])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(settings: Make, trainee: Make) -> None:
    made = trainee(settings())
    short, long = row([5, 9, 11]), row(list(range(20, 60)))
    together = made.losses([short, long])
    for one, alone in zip(together, [made.losses([short])[0], made.losses([long])[0]], strict=True):
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-5)


def test_every_token_but_the_first_is_learned_once() -> None:
    documents = [list(range(start, start + length)) for start, length in ((0, 5), (100, 1), (200, 23), (300, 2))]
    rows = list(pack(iter(documents), 8))
    assert [len(r.ids) for r in rows[:-1]] == [8] * (len(rows) - 1)
    assert [label for r in rows for label in r.labels] == [token for ids in documents for token in ids[1:]]


def test_batches_depend_on_seed_and_step_only(settings: Make, corpus: Make) -> None:
    one, other = corpus(settings()), corpus(settings())
    later = [one.batch(step, 3) for step in range(40)]
    assert [other.batch(step, 3) for step in reversed(range(40))] == later[::-1]
    assert corpus(settings(seed=8)).batch(0, 3) != later[0]


def test_fill_in_the_middle_is_what_serving_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    )
    fmt = prompts.detect(tokenizer)
    assert fmt.style == "psm"
    text = "def f(x):\n    return x\n"
    made = Corpus([Document("a.py", "s", text)], tokenizer, fmt, window=256, fim_rate=1.0, seed=0)
    (found,) = made.batch(0, 1)
    assert fmt.middle_id is not None
    spot = found.ids.index(fmt.middle_id)
    ids = [*found.ids, found.labels[-1]]
    middle = tokenizer.decode(ids[spot + 1 : -1])
    before = tokenizer.decode(ids[ids.index(fmt.prefix_id) + 1 : ids.index(fmt.suffix_id)])
    after = tokenizer.decode(ids[ids.index(fmt.suffix_id) + 1 : spot])
    assert (before + middle + after).endswith(text) and ids[-1] == fmt.eot_id


# --- gradients ---


def test_accumulation_equals_one_large_batch(settings: Make, trainee: Make, corpus: Make) -> None:
    made = trainee(settings())
    stir(made)
    rows = corpus(settings()).batch(0, 8)
    tokens = sum(len(r.ids) for r in rows)
    whole_loss = made.accumulate(rows, tokens)
    whole = gradients(made)
    loss = sum(made.accumulate([one], tokens) for one in rows)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, gradient in gradients(made).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def test_low_memory_mode_changes_no_gradient(settings: Make, trainee: Make, corpus: Make) -> None:
    rows = corpus(settings()).batch(0, 2)
    found = []
    for low in (False, True):
        made = trainee(settings(low_gpu_memory_mode=low))
        stir(made)
        made.accumulate(rows, 100)
        found.append(gradients(made))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7)


def test_a_fresh_adapter_is_the_base_model(settings: Make, trainee: Make, base: Path) -> None:
    from services.core.models import weights

    ids = list(range(30, 60))
    loss = trainee(settings()).losses([row(ids)])[0].mean().item()
    model = weights.load_model(base, torch.float32)
    expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_without_products_of_bfloat16_it_trains_in_float32(settings: Make, trainee: Make, base: Path) -> None:
    batch, made = [row(list(range(30, 60)))], trainee(settings())
    with without_bfloat16():
        own = Trainee(base, settings(), device=torch.device("cpu"))
    assert {part.dtype for part in own.weights().values()} == {torch.float32}
    assert own.accumulate(batch, 30) == made.accumulate(batch, 30)


def test_init_scale_is_the_norm_of_every_row(settings: Make, trainee: Make) -> None:
    for name, master in trainee(settings(lora_init_scale=0.25)).masters.items():
        if ".lora_A." in name:
            torch.testing.assert_close(master.norm(dim=1), torch.full((4,), 0.25))
        else:
            assert not master.any()


def test_without_target_modules_every_layer_but_the_head_is_adapted(settings: Make, trainee: Make) -> None:
    made = trainee(settings(target_modules=()))
    layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert set(made.target_modules) == set(layers.split())


def test_an_unknown_layer_is_refused(settings: Make, trainee: Make) -> None:
    with pytest.raises(errors.InvalidHyperparameter) as caught:
        trainee(settings(target_modules=("q_proj", "nothing_proj")))
    assert caught.value.field == "hyperparameters.target_modules"


# --- loop ---


def run(
    trainee: Trainee,
    settings: Settings,
    corpus: Corpus,
    held_out: HeldOut,
    state: State | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> list[Any]:
    optimizer = loop.make_optimizer(trainee, settings)
    return list(loop.train(trainee, optimizer, settings, corpus, held_out, state or State(), is_cancelled))


def test_training_lowers_train_and_test_loss(settings: Make, trainee: Make, corpus: Make, held_out: Make) -> None:
    chosen = settings(train_steps=40, decay_steps=38, eval_steps=10)
    events = run(trainee(chosen), chosen, corpus(chosen), held_out(chosen))
    steps = [event for event in events if isinstance(event, StepDone)]
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    assert [event.step for event in steps] == list(range(1, 41))
    assert [event.step for event in evaluations] == [0, 10, 20, 30, 40]
    assert steps[-1].train_loss < 0.8 * steps[0].train_loss
    assert evaluations[-1].test.loss < 0.8 * evaluations[0].test.loss
    best = min(evaluations, key=lambda event: event.test.loss)
    last_best = [event for event in events if isinstance(event, CheckpointDue) and event.is_best][-1]
    assert (last_best.step, last_best.test_loss) == (best.step, best.test.loss)


def test_learning_rate_rises_then_falls_to_a_tenth(settings: Make) -> None:
    chosen = settings(warmup_steps=4, decay_steps=10, learning_rate=1.0)
    rates = [loop.learning_rate(chosen, step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5:15] == pytest.approx([1 - 0.09 * n for n in range(1, 11)])
    assert rates[15:] == pytest.approx([0.1] * 5)


def test_a_run_that_learns_nothing_publishes_nothing_and_ends_early(
    settings: Make, trainee: Make, corpus: Make, held_out: Make
) -> None:
    chosen = settings(learning_rate=0.0, weight_decay=0.0, train_steps=100, eval_steps=2, early_stopping_patience=3)
    state = State()
    events = run(trainee(chosen), chosen, corpus(chosen), held_out(chosen), state)
    assert state.ended == "no gain" and state.step == 6
    assert not any(isinstance(event, CheckpointDue) and event.is_best for event in events)
    assert isinstance(events[-1], CheckpointDue)


def test_the_time_limit_ends_with_an_evaluation(settings: Make, trainee: Make, corpus: Make, held_out: Make) -> None:
    chosen = settings(train_steps=100_000, decay_steps=100, eval_steps=1000, time_limit_seconds=0.5)
    state = State()
    events = run(trainee(chosen), chosen, corpus(chosen), held_out(chosen), state)
    assert state.ended == "out of time" and isinstance(events[-1], CheckpointDue)
    assert isinstance(events[-2], Evaluated) and events[-2].step == state.step < 1000


def test_cancelling_stops_within_a_micro_batch(settings: Make, trainee: Make, corpus: Make, held_out: Make) -> None:
    chosen = settings()
    made, state, asked = trainee(chosen), State(), []
    story = loop.train(
        made, loop.make_optimizer(made, chosen), chosen, corpus(chosen), held_out(chosen), state, lambda: bool(asked)
    )
    while not isinstance(next(story), StepDone):
        pass
    asked.append(True)
    with pytest.raises(errors.JobCancelled):
        list(story)
    assert state.step == 1


# --- evaluation ---


def test_the_loss_is_weighted_by_tokens_and_told_by_source(settings: Make, trainee: Make, held_out: Make) -> None:
    texts = [Document("a.py", "one", "x = 1\n" * 30), Document("b.py", "two", "def f(): pass\n")]
    chosen = settings()
    made = trainee(chosen)
    both = held_out(chosen, texts).evaluate(made, 2, lambda: False)
    each = [held_out(chosen, [text]).evaluate(made, 1, lambda: False) for text in texts]
    assert both.by_source == pytest.approx({"one": each[0].loss, "two": each[1].loss}, rel=1e-5)
    expected = sum(found.loss * found.tokens for found in each) / sum(found.tokens for found in each)
    assert both.loss == pytest.approx(expected, rel=1e-5) and both.tokens == sum(found.tokens for found in each)


def test_the_budget_is_spread_over_the_files(settings: Make, held_out: Make) -> None:
    texts = [Document(f"{n}.py", f"s{n}", "x" * size) for n, size in enumerate((10, 1000, 5000))]
    few = held_out(settings(max_eval_tokens=400), texts)
    assert 300 < few.tokens <= 400
    assert {number for number, _ in few._rows} == {0, 1, 2}


# --- checkpoints ---


def test_a_later_process_goes_on_bitwise(
    settings: Make, trainee: Make, corpus: Make, held_out: Make, tmp_path: Path
) -> None:
    chosen = settings(lora_dropout=0.1)

    def through(stop_at: int) -> tuple[list[Any], str]:
        made, state = trainee(chosen), State()
        optimizer = loop.make_optimizer(made, chosen)
        told: list[Any] = []
        folder = tmp_path / str(stop_at)
        story = loop.train(made, optimizer, chosen, corpus(chosen), held_out(chosen), state, lambda: False)
        for event in story:
            told.append(event)
            if isinstance(event, CheckpointDue) and event.step == stop_at:
                checkpoint.save_state(made, optimizer, state, folder)
                made = trainee(chosen)
                optimizer = loop.make_optimizer(made, chosen)
                state = checkpoint.load_state(made, optimizer, folder)
                told += run_on(made, optimizer, chosen, corpus(chosen), held_out(chosen), state)
                break
        return told, checkpoint.save_adapter(made, folder / "adapter", "tiny")[1]

    def run_on(made: Trainee, optimizer: Any, *rest: Any) -> list[Any]:
        return list(loop.train(made, optimizer, *rest, lambda: False))

    whole, digest = through(-1)
    resumed, resumed_digest = through(6)
    assert digest == resumed_digest
    assert [(e.step, e.train_loss) for e in whole if isinstance(e, StepDone)] == [
        (e.step, e.train_loss) for e in resumed if isinstance(e, StepDone)
    ]


def test_an_interrupted_evaluation_is_made_up_for(
    settings: Make, trainee: Make, corpus: Make, held_out: Make, tmp_path: Path
) -> None:
    """A worker that shuts down during the last evaluation leaves no step for its successor, only that evaluation."""
    chosen = settings(train_steps=4, eval_steps=4)
    made, state, asked = trainee(chosen), State(), []
    optimizer = loop.make_optimizer(made, chosen)
    story = loop.train(made, optimizer, chosen, corpus(chosen), held_out(chosen), state, lambda: bool(asked))
    with pytest.raises(errors.JobCancelled):
        for event in story:
            if isinstance(event, StepDone) and event.step == 4:
                asked.append(True)
    checkpoint.save_state(made, optimizer, state, tmp_path)
    after = trainee(chosen)
    optimizer = loop.make_optimizer(after, chosen)
    state = checkpoint.load_state(after, optimizer, tmp_path)
    told = list(loop.train(after, optimizer, chosen, corpus(chosen), held_out(chosen), state, lambda: False))
    assert [type(event) for event in told] == [Evaluated, CheckpointDue]
    assert state.step == 4 and state.ended == "all steps done"


def test_an_ended_run_does_nothing_more(
    settings: Make, trainee: Make, corpus: Make, held_out: Make, tmp_path: Path
) -> None:
    chosen = settings(train_steps=4)
    made, state = trainee(chosen), State()
    optimizer = loop.make_optimizer(made, chosen)
    list(loop.train(made, optimizer, chosen, corpus(chosen), held_out(chosen), state, lambda: False))
    checkpoint.save_state(made, optimizer, state, tmp_path)
    after = trainee(chosen)
    optimizer = loop.make_optimizer(after, chosen)
    state = checkpoint.load_state(after, optimizer, tmp_path)
    assert not list(loop.train(after, optimizer, chosen, corpus(chosen), held_out(chosen), state, lambda: False))


def test_the_adapter_is_a_peft_directory_that_computes_the_same(
    settings: Make, trainee: Make, base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    from services.core.models import weights

    made = trainee(settings())
    stir(made)
    files, digest = checkpoint.save_adapter(made, tmp_path, "tiny")
    assert len(digest) == 64 and sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads(files["adapter_config.json"].read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "tiny")
    assert all(math.isfinite(float(t.sum())) for t in load_file(files["adapter_model.safetensors"]).values())
    peft: Any = PeftModel.from_pretrained(weights.load_model(base, torch.float32), tmp_path)
    ids = list(range(40, 80))
    logits = peft(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    expected = functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(made.losses([row(ids)])[0].clone(), expected.detach(), rtol=1e-4, atol=1e-5)
