"""What a CUDA graph does, on a CPU: the same operations over the same memory again, whatever Python would do now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
}
"""The host would have to know what was computed: bool(), item(), tolist()."""
COPIES = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default}
"""Numbers of the host that become a tensor."""


def waits(func: Any, args: Any) -> bool:
    """Whether the host has to know what was computed, be it to know how much comes out of an index by a mask."""
    masks = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool]
    return func in _WAITING or (func in (_aten.index.Tensor, _aten.index_put_.default) and bool(masks))


class Tape(TorchDispatchMode):
    """Records all operations within it; none of them may need the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not waits(func, args), f"{func} waits for the device"
        assert func not in COPIES, "numbers are copied from the host in every step"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _tensors(out)))
        return out

    def play(self) -> None:
        """Does all of it again, to where it went the first time."""
        for func, args, kwargs, kept in self.calls:
            for old, new in zip(kept, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


class Recorder:
    """Makes tapes, and counts."""

    def __init__(self) -> None:
        self.made = self.played = 0

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        self.made += 1
        compute()  # libraries' first call, which cannot be recorded
        tape = Tape()
        with tape:
            compute()

        def play() -> None:
            self.played += 1
            tape.play()

        return play


def _tensors(out: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
