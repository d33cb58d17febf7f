"""The processes that train one run together, and what they tell each other.

Every rank holds the whole adapter and its optimizer. It computes the gradient of its share of a batch; the shares'
gradients are summed in fp32, so that all ranks take the very same step. What one rank alone would know (a cancellation,
the time) is agreed upon, because a rank that leaves the loop earlier than the others leaves them waiting for ever.

Each method that says so is a collective: all ranks have to call it, in the same order. With one rank each of them
gives back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from services.trainer.corpus.data import IGNORED, Row

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: rank 0 may be waiting for room for a checkpoint."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those of a run."""

    rank: int = 0
    size: int = 1

    def share(self, rows: Sequence[Row]) -> list[Row]:
        """This rank's rows of a batch: every size-th one.

        All shares are equally long, so that all ranks make the same number of passes: a rank that has one row less gets
        a row without a loss, which adds nothing to loss and gradient.
        """
        mine = list(rows[self.rank :: self.size])
        if len(mine) < -(-len(rows) // self.size):
            mine.append(Row(rows[0].ids, [IGNORED] * len(rows[0].ids), rows[0].positions))
        return mine

    def sum(self, values: Sequence[float]) -> list[float]:
        """Collective: the sums over the ranks, place by place."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def least(self, value: float) -> float:
        """Collective: the lowest value of all ranks."""
        return self._reduced([value], dist.ReduceOp.MIN)[0]

    def any(self, flag: bool) -> bool:
        """Collective: whether it is so on any rank."""
        return bool(self._reduced([float(flag)], dist.ReduceOp.MAX)[0])

    def agreed(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """The same question, with one answer on all ranks; asking it is a collective."""
        return flag if self.size == 1 else lambda: self.any(flag())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Collective: gives every parameter the sum of the ranks' gradients, in their own dtype (fp32 for masters)."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size == 1 or not gradients:
            return
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        for gradient, part in zip(gradients, torch.split(together, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Collective: overwrites the tensors with those of rank 0."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor.detach(), src=0)

    def _reduced(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)  # on the CPU, where no kernel has to be waited for
        dist.all_reduce(together, operation)
        return together.tolist()


ALONE = Ranks()
"""A run of one process."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torch elastic started with it; sets its GPU, if there are any.

    Numbers travel through gloo, GPU tensors through NCCL.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
