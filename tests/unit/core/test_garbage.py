"""Cycles are not looked for while a block runs, and are again after it."""

from __future__ import annotations

import gc

import pytest

from services.core import garbage


def test_nothing_is_looked_for_meanwhile() -> None:
    with garbage.unsearched():
        assert not gc.isenabled()
        with garbage.unsearched():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_raises_ends_it() -> None:
    with pytest.raises(ValueError, match="no model"), garbage.unsearched():
        raise ValueError("no model")
    assert gc.isenabled()


def test_a_process_that_never_looks_goes_on_so() -> None:
    gc.disable()
    try:
        with garbage.unsearched():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
