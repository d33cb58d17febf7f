"""AUTO: arithmetic that a person can check."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.core.errors import InvalidHyperparameter
from services.trainer.planning.plan import Facts, foreign_tokens, plan
from services.trainer.planning.settings import RANGES, Settings, check

FACTS = Facts(
    train_tokens=300_000,
    test_tokens=30_000,
    base_loss=1.4,
    parameters=134_515_008,
    context_length=8192,
    lora_targets=("q_proj", "v_proj"),
    has_fim=False,
    tokens_per_second=300,
    on_gpu=False,
)
TOKENS = st.integers(0, 10**9)
LOSSES = st.floats(0, 6)


def planned_tokens(facts: Facts, **requested: float) -> int:
    settings, _ = plan(Hyperparameters(**requested), facts)
    return settings.train_steps * settings.batch_size * settings.context_length


@given(TOKENS, TOKENS, LOSSES, st.booleans(), st.sampled_from([{}, {"context_length": 1000}, {"batch_size": 3}]))
def test_more_data_never_plans_fewer_tokens(
    one: int, other: int, loss: float, on_gpu: bool, requested: dict[str, int]
) -> None:
    facts = replace(FACTS, base_loss=loss, on_gpu=on_gpu)
    less, more = sorted((one, other))
    assert planned_tokens(replace(facts, train_tokens=less), **requested) <= planned_tokens(
        replace(facts, train_tokens=more), **requested
    )


@given(TOKENS, TOKENS, st.floats(1, 1e5), st.floats(0.1, 1e5), LOSSES)
def test_every_plan_is_one_that_may_be_asked_for(
    tokens: int, test_tokens: int, limit: float, speed: float, loss: float
) -> None:
    facts = replace(FACTS, train_tokens=tokens, test_tokens=test_tokens, tokens_per_second=speed, base_loss=loss)
    settings, told = plan(Hyperparameters(time_limit_seconds=limit), facts)
    check(settings.to_proto(), FACTS.context_length)
    assert settings.batch_size % settings.micro_batch_size == 0
    assert Settings.from_proto(told.hyperparameters) == settings
    assert told.estimated_seconds <= limit


@given(st.floats(60, 3600), st.floats(20, 1e5))
def test_a_time_limit_caps_the_tokens(limit: float, speed: float) -> None:
    facts = replace(FACTS, train_tokens=10**9, tokens_per_second=speed)
    tokens = planned_tokens(facts, time_limit_seconds=limit)
    assert tokens <= max(limit * speed, 512)


@pytest.mark.parametrize("tokens", [300_000, 3_000_000, 30_000_000])
def test_evaluation_takes_a_quarter_of_the_training_at_most(tokens: int) -> None:
    settings, told = plan(Hyperparameters(), replace(FACTS, train_tokens=tokens, test_tokens=tokens))
    trained = settings.train_steps * settings.batch_size * settings.context_length / FACTS.tokens_per_second
    assert trained < told.estimated_seconds < 1.27 * trained  # beside 0.25 what foreign code takes


def test_a_run_of_five_minutes_has_time_for_its_proof() -> None:
    facts = replace(FACTS, train_tokens=10**7, test_tokens=10**6, tokens_per_second=400)
    settings, told = plan(Hyperparameters(time_limit_seconds=300), facts)
    trained = settings.train_steps * settings.batch_size * settings.context_length / 400
    assert trained > 0.65 * 300 and told.estimated_seconds < 300
    assert 24 <= settings.proof_places < 40


def test_a_run_of_a_minute_trains_for_half_of_it() -> None:
    facts = replace(FACTS, train_tokens=10**7, test_tokens=10**6)
    settings, told = plan(Hyperparameters(time_limit_seconds=60), facts)
    trained = settings.train_steps * settings.batch_size * settings.context_length / FACTS.tokens_per_second
    assert trained > 0.45 * 60 and told.estimated_seconds < 60
    assert settings.proof_places >= 8 and foreign_tokens(settings) >= 512


def test_the_proof_grows_with_the_run_within_its_bounds() -> None:
    plans = [plan(Hyperparameters(), replace(FACTS, train_tokens=n, test_tokens=n))[0] for n in (10**5, 10**6, 10**8)]
    counts = [settings.proof_places for settings in plans]
    assert counts == sorted(counts) and counts[0] >= 24 and counts[-1] == 400
    few, _ = plan(Hyperparameters(max_eval_tokens=640), FACTS)
    assert few.proof_places == 10 and foreign_tokens(few) == 640


def test_a_proof_of_more_places_takes_its_time_from_the_training() -> None:
    facts = replace(FACTS, train_tokens=10**7, test_tokens=10**6, tokens_per_second=400)
    short, _ = plan(Hyperparameters(time_limit_seconds=600), facts)
    more, told = plan(Hyperparameters(time_limit_seconds=600, proof_places=200), facts)
    assert more.proof_places == 200 and told.estimated_seconds < 600
    assert more.train_steps * more.batch_size < short.train_steps * short.batch_size


def test_code_that_the_base_predicts_badly_is_trained_longer() -> None:
    assert planned_tokens(replace(FACTS, base_loss=0.7)) < planned_tokens(replace(FACTS, base_loss=1.8))


def test_every_setting_is_told_with_its_reason() -> None:
    settings, told = plan(Hyperparameters(learning_rate=3e-4, target_modules=["o_proj"]), FACTS)
    by_name = {setting.name: setting for setting in told.settings}
    assert set(by_name) == set(Settings.__dataclass_fields__)
    assert all(setting.why and setting.value for setting in told.settings)
    assert [name for name, setting in by_name.items() if setting.given] == ["learning_rate", "target_modules"]
    assert settings.learning_rate == 3e-4 and settings.target_modules == ("o_proj",)


def test_wide_models_learn_more_slowly() -> None:
    rates = [
        plan(Hyperparameters(), replace(FACTS, parameters=size))[0].learning_rate for size in (10**8, 10**9, 10**10)
    ]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]


def test_a_model_of_unknown_size_and_length_gets_a_plan() -> None:
    settings, _ = plan(Hyperparameters(), replace(FACTS, parameters=0, context_length=0, lora_targets=()))
    assert settings.context_length == 512 and 1e-4 <= settings.learning_rate <= 1.5e-3


@pytest.mark.parametrize("name", RANGES)
def test_a_setting_outside_its_range_is_named(name: str) -> None:
    low, high = RANGES[name]
    whole = Hyperparameters.DESCRIPTOR.fields_by_name[name].type in (3, 5)  # int64, int32
    outside = [low - 1] if whole else [low - 1, high * 2 + 1, float("nan")]
    if whole and high < 2**31 - 1:
        outside.append(high + 1)
    for value in outside:
        with pytest.raises(InvalidHyperparameter) as caught:
            check(Hyperparameters(**{name: int(value) if whole else value}), 2**30)
        assert caught.value.field == f"hyperparameters.{name}" and caught.value.hint


@pytest.mark.parametrize(
    ("requested", "field"),
    [
        ({"context_length": 9000}, "context_length"),
        ({"batch_size": 4, "micro_batch_size": 8}, "micro_batch_size"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size"),
        ({"train_steps": 10, "warmup_steps": 11}, "warmup_steps"),
        ({"target_modules": ["../etc"]}, "target_modules"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(requested: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidHyperparameter) as caught:
        plan(Hyperparameters(**requested), FACTS)
    assert caught.value.field == f"hyperparameters.{field}"


@pytest.mark.parametrize("requested", [{"micro_batch_size": 3}, {"warmup_steps": 5000}, {"micro_batch_size": 64}])
def test_auto_goes_around_what_was_asked_for(requested: dict[str, int]) -> None:
    settings, _ = plan(Hyperparameters(**requested), FACTS)
    check(settings.to_proto(), FACTS.context_length)


def test_half_of_the_documents_get_a_middle_where_the_base_knows_how() -> None:
    for has_fim, rate in ((True, 0.5), (False, 0.0)):
        settings, told = plan(Hyperparameters(), replace(FACTS, has_fim=has_fim))
        (why,) = [setting.why for setting in told.settings if setting.name == "fim_rate"]
        assert settings.fim_rate == rate and ("as the base was trained" in why) == has_fim


def test_a_plan_of_an_older_release_can_be_gone_on_with() -> None:
    settings, told = plan(Hyperparameters(), FACTS)
    for name in ("keep_checkpoints", "max_foreign_loss_increase", "proof_places"):
        told.hyperparameters.ClearField(name)
    assert Settings.from_proto(told.hyperparameters) == replace(settings, proof_places=24)
