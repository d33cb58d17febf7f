"""From a dataset to the settings of a run: pure arithmetic, every choice with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan, PlannedSetting
from services.trainer.planning.settings import Settings, check

EVALUATION_SPEEDUP = 2.5
"""Tokens evaluated in the time of one token trained: no backward pass, and no adapter gradients."""
PROMPT_TOKENS = 320
"""Most tokens of a prompt at a place of the proof."""
_FOREIGN_TOKENS = 4096
"""Enough to see a rise of 2 %: several times the noise between two versions."""
PLACE_TOKENS = 400
"""Tokens evaluated in the time in which a line of the proof is written, its prompt included; 330 to 540 on a CPU."""
_FEWEST_PLACES, _MOST_PLACES = 24, 400
"""Of each kind, next lines and filled-in ones: fewer show nothing, more show nothing more."""
_LEAST_EVAL_TOKENS = 4096
_EVAL_TOKENS_PER_PLACE = 64
"""Of max_eval_tokens, which thus also keeps the proof short."""
_LOSS_SHARE, _PROOF_SHARE = 0.12, 0.05
"""Of the training's time: all evaluations of the test set together; each version's lines of the proof."""
_LEAST_STEPS = 80
"""A time limit shrinks batch and window before it takes more steps than this away: few large steps learn little."""
_HIGHEST_RATE = 1e-3
"""Learning rate of AUTO. On minio-py, 40 steps of 1,024 tokens, SmolLM2-135M: 8e-4, 1.3e-3 and 2e-3 raise the loss on
foreign code by 0.9, 1.6 and 3.6 %, and what raises it by more than 2 % is not published."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan is made from."""

    train_tokens: int
    test_tokens: int
    base_loss: float
    """Loss of the base model on the dataset in nats per token; 0 when unknown."""
    parameters: int
    """Of the base model; 0 while unknown."""
    context_length: int
    """Longest sequence of the base model, in tokens; 0 while unknown."""
    lora_targets: tuple[str, ...]
    """Empty means every linear layer but the head."""
    has_fim: bool
    """Whether the tokenizer has fill-in-the-middle tokens."""
    tokens_per_second: float
    """Training speed of the machine with this model, measured or estimated."""
    on_gpu: bool


@dataclass(slots=True)
class _Choices:
    """Settings as they are chosen: the caller's own value where there is one, else the given default."""

    requested: Hyperparameters
    told: list[PlannedSetting] = field(default_factory=list)

    def choose(self, name: str, value: float, why: str) -> float:
        given = self.requested.HasField(name)
        chosen: float = getattr(self.requested, name) if given else value
        text = "none" if math.isinf(chosen) else f"{chosen:g}" if isinstance(chosen, float) else str(chosen)
        self.told.append(PlannedSetting(name=name, value=text, given=given, why="as asked for" if given else why))
        return chosen


def foreign_tokens(settings: Settings) -> int:
    """Tokens of foreign code that are evaluated with the base model, and with each version that would be the best."""
    return min(_FOREIGN_TOKENS, settings.max_eval_tokens)


def plan(requested: Hyperparameters, facts: Facts) -> tuple[Settings, Plan]:
    """Resolves every setting. More data never plans fewer tokens (without a time limit).

    3 passes over little data, ever fewer over more, 1 over 4 million tokens; more for code that the base model predicts
    badly. On pluggy (13,000 tokens) the test loss is lowest after 3 passes; 7 passes leave it 13 % higher, and the loss
    on foreign code as well.

    Raises:
        InvalidHyperparameter: see services/trainer/planning/settings.check.
    """
    check(requested, facts.context_length)
    pick = _Choices(requested)
    limit = pick.choose("time_limit_seconds", math.inf, "no limit")
    least_places = requested.proof_places if requested.HasField("proof_places") else _FEWEST_PLACES
    budget = _train_budget(limit * facts.tokens_per_second, least_places * (1 + facts.has_fim))
    window, why = _window(facts, budget)
    window = int(pick.choose("context_length", window, why))
    tokens = max(1, facts.train_tokens)
    batch, why = _batch_size(tokens, window, budget)
    if requested.HasField("micro_batch_size") and batch % requested.micro_batch_size:
        batch += requested.micro_batch_size - batch % requested.micro_batch_size
        why = "a multiple of the micro-batch asked for"
    batch = int(pick.choose("batch_size", batch, why))
    complexity = min(1.2, max(0.7, facts.base_loss / 1.2)) if facts.base_loss else 1.0
    epochs = min(3.0, max(1.0, 3 * (5e4 / tokens) ** 0.25)) * complexity
    steps = min(2000, max(20, math.ceil(epochs * tokens / (batch * window))))
    why = f"{epochs:.1f} passes over {tokens:,} tokens of loss {facts.base_loss:.2f}, within 20 and 2,000 steps"
    fitting = max(1, math.floor(budget / (batch * window))) if math.isfinite(budget) else steps
    unlimited = steps
    if fitting < steps:
        steps, why = fitting, f"as many as {limit:.0f} s hold at {facts.tokens_per_second:.0f} tokens/s"
    if steps < (least := max(requested.warmup_steps, requested.eval_steps)):
        steps, why = least, "as many as the warmup, or the first evaluation, that was asked for"
    steps = int(pick.choose("train_steps", steps, why))
    warmup = int(pick.choose("warmup_steps", min(100, steps // 10), "a tenth of the steps, at most 100"))
    decay = int(pick.choose("decay_steps", max(1, steps - warmup), "to the end of the run"))
    evaluations = min(20, max(2 if fitting < unlimited else 4, steps // 40))
    eval_steps = int(pick.choose("eval_steps", max(1, math.ceil(steps / evaluations)), f"{evaluations} evaluations"))
    share = _LOSS_SHARE * steps * batch * window * EVALUATION_SPEEDUP / (evaluations + 1)
    least_tokens = min(_LEAST_EVAL_TOKENS, max(512, budget / 16))  # less within a short time limit
    eval_tokens = int(min(max(share, least_tokens), max(64, facts.test_tokens), 500_000))
    affordable = _PROOF_SHARE * steps * batch * window * EVALUATION_SPEEDUP / (PLACE_TOKENS * (1 + facts.has_fim))
    places = int(min(max(affordable, _FEWEST_PLACES), _MOST_PLACES))
    width = math.sqrt(1.3e9 / (facts.parameters or 1.3e9))  # relative to a model of hidden size 2,000
    max_eval_tokens = int(
        pick.choose("max_eval_tokens", eval_tokens, "an eighth of the training's time, or what tells something")
    )
    settings = Settings(
        lora_r=int(pick.choose("lora_r", 16, "enough for the idioms of one code base")),
        lora_alpha=pick.choose("lora_alpha", 2.0 * _rank(requested), "twice the rank"),
        lora_init_scale=pick.choose("lora_init_scale", 0.0, "PEFT's own initialisation") or None,
        lora_dropout=pick.choose("lora_dropout", 0.0, "the best checkpoint is chosen on held-out files anyway"),
        target_modules=tuple(requested.target_modules) or facts.lora_targets,
        learning_rate=pick.choose(
            "learning_rate",
            round(min(_HIGHEST_RATE, max(1e-4, 5e-4 * width**0.85)), 5),
            "falls with the width of the model; more would make a small one forget other code",
        ),
        batch_size=batch,
        micro_batch_size=int(
            pick.choose("micro_batch_size", _micro_batch(batch, window, facts.on_gpu), "what fits, and is fastest")
        ),
        warmup_steps=warmup,
        weight_decay=pick.choose("weight_decay", 0.01, "mild, the adapter is small"),
        train_steps=steps,
        decay_steps=decay,
        low_gpu_memory_mode=requested.low_gpu_memory_mode,
        context_length=window,
        fim_rate=pick.choose(
            "fim_rate",
            0.5 if facts.has_fim else 0.0,
            "half, as the base was trained"
            if facts.has_fim
            else "the base has no tokens for it; taught spare ones it wrote held-out lines no better (bench/fim.py)",
        ),
        seed=int(pick.choose("seed", 0, "any will do")),
        time_limit_seconds=limit if math.isfinite(limit) else None,
        early_stopping_patience=int(pick.choose("early_stopping_patience", 5, "five evaluations without gain")),
        eval_steps=eval_steps,
        checkpoint_steps=int(pick.choose("checkpoint_steps", max(eval_steps, 50), "little is lost with a worker")),
        max_eval_tokens=max_eval_tokens,
        max_grad_norm=pick.choose("max_grad_norm", 1.0, "usual for language models"),
        keep_checkpoints=int(pick.choose("keep_checkpoints", 3, "beside best, last and kept ones: a way back")),
        max_foreign_loss_increase=pick.choose(
            "max_foreign_loss_increase", 0.02, "a version that forgets other code is not published as best"
        ),
        proof_places=int(
            pick.choose(
                "proof_places",
                min(places, max_eval_tokens // _EVAL_TOKENS_PER_PLACE),
                "what a tenth of the training's time pays for, for base and adapter together",
            )
        ),
    )
    pick.told.append(
        PlannedSetting(
            name="target_modules",
            value=", ".join(settings.target_modules) or "all",
            given=bool(requested.target_modules),
            why="as asked for" if requested.target_modules else "every linear layer of the blocks",
        )
    )
    given = requested.HasField("low_gpu_memory_mode")
    why = "as asked for" if given else "off: it costs a third more time"
    value = str(settings.low_gpu_memory_mode).lower()
    pick.told.append(PlannedSetting(name="low_gpu_memory_mode", value=value, given=given, why=why))
    return settings, _describe(settings, facts, sorted(pick.told, key=_name))


def amend(plan: Plan, name: str, *, why: str, value: str = "") -> None:
    """Tells of a setting that another reason decided than the plan's own.

    Args:
        value: its new value, as text; empty leaves it.
    """
    for setting in plan.settings:
        if setting.name == name:
            setting.given, setting.why, setting.value = False, why, value or setting.value


def _describe(settings: Settings, facts: Facts, told: list[PlannedSetting]) -> Plan:
    trained = settings.train_steps * settings.batch_size * settings.context_length
    evaluations = 1 + math.ceil(settings.train_steps / settings.eval_steps)
    evaluated = evaluations * (min(settings.max_eval_tokens, max(1, facts.test_tokens)) + foreign_tokens(settings))
    evaluated += 2 * (1 + facts.has_fim) * settings.proof_places * PLACE_TOKENS
    seconds = (trained + evaluated / EVALUATION_SPEEDUP) / facts.tokens_per_second
    return Plan(
        hyperparameters=settings.to_proto(),
        settings=told,
        train_tokens=facts.train_tokens,
        test_tokens=facts.test_tokens,
        epochs=trained / max(1, facts.train_tokens),
        base_loss=facts.base_loss,
        estimated_seconds=min(seconds, settings.time_limit_seconds or math.inf),
    )


def _train_budget(tokens: float, places: int) -> float:
    """Tokens that can be trained in the time of that many, beside evaluations, checkpoints and the proof's places.

    A quarter is theirs, or more where the least that they take is more; half of the time is trained in any case.
    """
    proof = 2 * places * PLACE_TOKENS
    least = (proof + 4 * (_LEAST_EVAL_TOKENS + _FOREIGN_TOKENS)) / EVALUATION_SPEEDUP
    return max(0.5 * tokens, min(0.75 * tokens, 0.95 * tokens - least))


def _name(setting: PlannedSetting) -> str:
    return setting.name


def _rank(requested: Hyperparameters) -> int:
    return requested.lora_r if requested.HasField("lora_r") else 16


def _window(facts: Facts, budget: float) -> tuple[int, str]:
    """Tokens per sequence: what a function needs with its surroundings, less where a time limit is tight."""
    ideal = 2048 if facts.on_gpu else 512
    window = ideal
    while window > 256 and budget / window < _LEAST_STEPS:
        window //= 2
    why = "long enough for a function with its surroundings" + ("" if facts.on_gpu else ", short enough for a CPU")
    if window < ideal:
        why = f"small enough for {_LEAST_STEPS} steps within the time limit"
    return min(facts.context_length or 2048, window), why


def _batch_size(tokens: int, window: int, budget: float) -> tuple[int, str]:
    """Sequences per step: 1 to 32 as the data grows, fewer where a time limit would leave too few steps."""
    ideal = min(32, max(1, 2 ** math.floor(math.log2(max(1, tokens / (16 * window))))))
    batch = ideal
    while batch > 1 and budget / (batch * window) < _LEAST_STEPS:
        batch //= 2
    if batch < ideal:
        return batch, f"small enough for {_LEAST_STEPS} steps within the time limit"
    return batch, f"grows with the data: {tokens:,} tokens"


def _micro_batch(batch: int, window: int, on_gpu: bool) -> int:
    """The largest divisor of the batch whose tokens fit comfortably."""
    most = max(1, (16_384 if on_gpu else 1_024) // window)
    return max(size for size in range(1, batch + 1) if batch % size == 0 and size <= most)
