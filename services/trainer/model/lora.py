"""A base model with a LoRA adapter on it, ready to train: what the loop calls, and nothing of how runs are managed.

The base stays frozen in bf16. The adapter computes in bf16 as well, and is what is evaluated, saved and served; the
optimizer works on fp32 master copies of it, because steps of 1e-3 are lost in 8 bits of mantissa. On a CPU that has no
products of bf16, all of it is fp32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from services.core.errors import InvalidHyperparameter, NotSupported
from services.core.models import weights
from services.trainer.corpus.data import Row, padded
from services.trainer.model import attention, kept, layers
from services.trainer.model.loss import summed_loss, token_losses
from services.trainer.model.shard import shard_base
from services.trainer.planning.settings import Settings

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Trainee:
    """The model that a run trains.

    Attributes:
        masters: fp32 copies of the adapter's weights, by name; what the optimizer changes.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        shards: int = 1,
    ) -> None:
        """Loads the base and puts a fresh adapter on it.

        Args:
            folder: of the base model, see services/core/models/weights.
            dtype: None is the device's, see :func:`services.core.models.weights.quick_dtype`; fp32 where exactness
                matters more than speed (tests).
            shards: ranks over which the base is spread, see services/trainer/model/shard.

        Raises:
            InvalidHyperparameter: the model has no layer of a name in target_modules.
            NotSupported: the model's logits are not the product of hidden states and head, scaled or not.
        """
        torch.manual_seed(settings.seed)
        dtype = dtype or weights.quick_dtype(device.type)
        base: Any = weights.load_model(folder, dtype)
        _drop_no_base(base)
        if shards > 1:
            shard_base(base, device, shards)
        else:
            base.to(device)
        self._check_targets(base, settings)
        self._logit_scale = _logit_scale(base.config)
        self._check_head(base, device, self._logit_scale)
        config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=cast(int, settings.lora_alpha),
            lora_dropout=settings.lora_dropout,
            target_modules=list(settings.target_modules) or "all-linear",
            bias="none",
            task_type="CAUSAL_LM",
        )
        self._model: Any = get_peft_model(base, config)
        self._base: Any = cast(Any, self._model).get_base_model()
        on_cpu, low = device.type == "cpu", settings.low_gpu_memory_mode
        self._arena = kept.Arena() if on_cpu and not low else None
        self._gives_back = on_cpu and low
        attention.use(self._base, self._arena)
        layers.speed_up(self._base, self._arena)
        self._device = device
        self._pad_id = int(getattr(base.config, "eos_token_id", None) or 0)
        if settings.lora_init_scale is not None:
            self._scale_rows(settings.lora_init_scale)
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in trained.items()}
        for parameter in trained.values():
            parameter.data = parameter.data.to(dtype)
        self._trained: dict[str, nn.Parameter] = trained
        self._gradients: dict[str, torch.Tensor] = {}
        if settings.low_gpu_memory_mode:
            kept.keep_inputs_only(self._base)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(sorted(self._model.peft_config["default"].target_modules))

    @property
    def trainable_parameters(self) -> int:
        """Number of the adapter's weights."""
        return sum(master.numel() for master in self.masters.values())

    def accumulate(self, rows: Sequence[Row], total_tokens: int) -> float:
        """Adds the gradient of sum(losses) / total_tokens over the rows; returns the sum of the losses in nats."""
        self._model.train()
        if self._arena is not None:
            self._arena.reset()
        hidden, labels = self._forward(rows)
        if self._gives_back:
            kept.give_back()
        loss = summed_loss(hidden, self._head, labels, scale=self._logit_scale)
        (loss / total_tokens).backward()  # type: ignore[no-untyped-call]
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                # In fp32: a sum of many micro-batches in bf16 would lose the last ones.
                gradient = parameter.grad.float()
                self._gradients[name] = self._gradients[name].add_(gradient) if name in self._gradients else gradient
                parameter.grad = None
        return loss.item()

    def losses(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """For each row the losses [positions] of its labels, in nats, without gradients."""
        self._model.eval()
        with torch.inference_mode():
            hidden, labels = self._forward(rows)
            flat = token_losses(hidden, self._head, labels, scale=self._logit_scale).view(len(rows), -1)
        return [flat[number, : len(row.ids)] for number, row in enumerate(rows)]

    def generate(
        self, prompts: Sequence[Sequence[int]], choose: Callable[[torch.Tensor, Sequence[int]], Sequence[int | None]]
    ) -> None:
        """Continues prompts token by token, with cached keys and values, until ``choose`` has ended each of them.

        Args:
            choose: is given the logits [prompts that go on, vocabulary] of their next tokens and the numbers of these
                prompts; returns the token that each goes on with, None for one that is complete.
        """
        self._model.eval()
        width = max(map(len, prompts))
        # Padding stands on the left, so that every prompt's last position is the row's last one.
        gaps = torch.tensor([width - len(prompt) for prompt in prompts], device=self._device)
        rows = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        ids = torch.tensor(rows, device=self._device)
        places = torch.arange(width, device=self._device) - gaps[:, None]
        mask, positions = places >= 0, places.clamp(min=0)
        cache = DynamicCache(config=self._base.config)
        going = list(range(len(prompts)))
        with torch.inference_mode():
            while going:
                hidden = self._base.base_model(
                    input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
                ).last_hidden_state[:, -1]
                chosen = choose(hidden @ self._head.T, going)
                kept = [row for row, token in enumerate(chosen) if token is not None]
                if len(kept) < len(going):
                    rest = torch.tensor(kept, dtype=torch.long, device=self._device)
                    mask, positions = mask[rest], positions[rest]
                    cache.batch_select_indices(rest)
                going = [going[row] for row in kept]
                ids = torch.tensor([[chosen[row]] for row in kept], dtype=torch.long, device=self._device)
                mask = torch.cat([mask, mask.new_ones(len(kept), 1)], dim=1)
                positions = positions[:, -1:] + 1

    def weights(self, strength: float = 1.0) -> dict[str, torch.Tensor]:
        """A copy of the adapter as it computes now, by name; for :meth:`wear`.

        Args:
            strength: share of the update that the copy makes of the base.
        """
        return {
            name: parameter.detach() * (strength if ".lora_B." in name else 1.0)
            for name, parameter in self._trained.items()
        }

    def wear(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Computes with this copy of an adapter until the next :meth:`publish`; the masters stay as they are."""
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])

    def take_gradients(self) -> None:
        """Moves the gradients that were accumulated to the masters."""
        for name, master in self.masters.items():
            master.grad = self._gradients.pop(name, None)

    def drop_gradients(self) -> None:
        """Forgets what was accumulated."""
        self._gradients.clear()

    def publish(self) -> None:
        """Copies the masters back into the adapter, after a step of the optimizer."""
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self.masters[name])

    def save(self, folder: Path, base_model: str) -> None:
        """Writes the adapter as a PEFT directory.

        Args:
            base_model: id of the base, written into the configuration instead of a path of this machine.
        """
        self._model.peft_config["default"].base_model_name_or_path = base_model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft looks for the base's own files at the hub
            self._model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)

    @property
    def _head(self) -> torch.Tensor:
        return cast(torch.Tensor, self._base.get_output_embeddings().weight)

    def _forward(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states [tokens, hidden size] and labels [tokens]."""
        ids, labels, positions = (torch.tensor(part, device=self._device) for part in padded(rows, self._pad_id))
        # No mask and no cache: only then does transformers keep packed documents apart by their positions.
        output = self._base.base_model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)
        return output.last_hidden_state.flatten(0, 1), labels.flatten()

    def _scale_rows(self, norm: float) -> None:
        """Gives every row of every A this L2 norm, as Refact's lora_init_scale does."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if ".lora_A." in name:
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                    parameter.mul_(norm / parameter.norm(dim=1, keepdim=True))

    @staticmethod
    def _check_head(base: Any, device: torch.device, scale: float) -> None:
        """Some models cap or shift their logits; the chunked loss would silently train them for something else."""
        ids = torch.arange(8, device=device)[None]
        with torch.no_grad():
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            plain = (hidden @ base.get_output_embeddings().weight.T).float() * scale
            logits = base(input_ids=ids, use_cache=False).logits.float()
        if float((plain - logits).abs().max()) > 0.02 * float(logits.abs().max()):
            raise NotSupported(
                "this model caps or shifts its logits, which cannot be trained yet",
                field="base_model",
                hint="Take another base model.",
            )

    @staticmethod
    def _check_targets(base: nn.Module, settings: Settings) -> None:
        names = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
        if strange := sorted(set(settings.target_modules) - names):
            raise InvalidHyperparameter(
                f"the model has no linear layer named {strange[0]!r}",
                field="hyperparameters.target_modules",
                hint=f"It has {', '.join(sorted(names))}.",
            )


def _drop_no_base(base: nn.Module) -> None:
    """Switches the base's own dropout off, which pre-training left in some configurations (GPT-BigCode: 0.1).

    The base is frozen, and the one dropout of a run is lora_dropout.
    """
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "residual_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _logit_scale(config: Any) -> float:
    """What Granite and Cohere multiply their logits with."""
    return float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
