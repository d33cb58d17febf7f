"""Two ranks do what one does: plain data parallelism and a sharded base, over gloo; one of them is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer.corpus.data import IGNORED, Row
from services.trainer.launch.elastic import ElasticLauncher
from services.trainer.ranks import ALONE, Ranks
from tests.unit.trainer.folders import checkpoints_of, prepared, running_ranks, steps_of


def rows(count: int) -> list[Row]:
    return [Row([n, n], [n, n], [0, 1]) for n in range(count)]


def test_shares_are_equally_long_and_hold_every_row_once() -> None:
    shares = [Ranks(rank, 3).share(rows(7)) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    labelled = [row for share in shares for row in share if row.labels[0] != IGNORED]
    assert sorted(row.ids[0] for row in labelled) == list(range(7))
    assert ALONE.share(rows(4)) == rows(4)


def test_fewer_rows_than_ranks() -> None:
    shares = [Ranks(rank, 4).share(rows(1)) for rank in range(4)]
    assert [len(share) for share in shares] == [1] * 4
    assert sum(row.labels[0] != IGNORED for share in shares for row in share) == 1


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["gradients", "sharded gradients"])
def test_two_ranks_have_the_loss_and_the_gradients_of_one(found: dict[str, Any], way: str) -> None:
    expected = found["alone"]["gradients"]
    assert any(gradient.abs().max() > 1e-4 for gradient in expected["gradients"].values())
    for rank in "01":
        assert found[rank][way]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        close(found[rank][way]["gradients"], expected["gradients"])


@pytest.mark.parametrize("way", ["run", "sharded run"])
def test_a_run_of_two_ranks_ends_with_the_adapter_of_one(found: dict[str, Any], way: str) -> None:
    expected = found["alone"]["run"]
    assert len(expected["steps"]) == 6 and len(expected["tests"]) == 3 and len(expected["tests"][0]) == 3
    for rank in "01":
        for what in ("steps", "tests"):
            assert torch.tensor(found[rank][way][what]) == pytest.approx(torch.tensor(expected[what]), rel=1e-6)
        close(found[rank][way]["masters"], expected["masters"])
    one, other = (found[rank][way]["masters"] for rank in "01")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_sharded_base_is_held_in_halves(found: dict[str, Any], base: Path) -> None:
    from services.core.models import weights

    whole = sum(p.numel() for p in weights.load_model(base, torch.float32).base_model.layers.parameters())
    assert found["0"]["held"] + found["1"]["held"] == whole
    assert max(found["0"]["held"], found["1"]["held"]) < 0.6 * whole


def test_what_one_rank_is_told_all_do(found: dict[str, Any]) -> None:
    one, other = (found[rank]["cancelled"] for rank in "01")
    assert one["cancelled"] and other["cancelled"] and one["step"] == other["step"] > 0
    one, other = (found[rank]["late"] for rank in "01")
    assert one["ended"] == other["ended"] == "out of time" and one["step"] == other["step"] == 1


def test_the_lines_of_the_proof_are_shared(found: dict[str, Any]) -> None:
    expected = found["alone"]["lines"]
    assert expected["written"] == 6 and len(set(expected["measured"][0])) > 1
    for rank, count in (("0", 4), ("1", 2)):  # of five next lines and one to fill in
        assert found[rank]["lines"] == {**expected, "written": count}
    one, other = (found[rank]["cancelled lines"] for rank in "01")
    assert one["cancelled"] and other["cancelled"]


def test_a_sharded_base_writes_each_line_with_all_its_parts(found: dict[str, Any]) -> None:
    one, other = (found[rank]["sharded lines"] for rank in "01")
    assert one == other and one["written"] == 6 and len(one["measured"][0]) == 5


def test_a_run_of_two_ranks_makes_one_proof(found: dict[str, Any]) -> None:
    (proof,) = [message.proof for message in found["told"] if message.HasField("proof")]
    assert proof.test_files == 2 and proof.adapter.test_loss < proof.base.test_loss


async def test_a_killed_rank_comes_back_and_ends_with_the_same_adapter(
    base: Path, tmp_path: Path, found: dict[str, Any]
) -> None:
    folder = prepared(tmp_path / "run", base)
    training = ElasticLauncher(2).start(folder)
    story = []
    killed = False
    async for message in training.events():
        story.append(message)
        if message.HasField("checkpoint"):
            folder.release(message.checkpoint)
        if message.HasField("step") and message.step.step >= 13 and not killed:
            running_ranks()[0].kill()
            killed = True
    await training.fence()
    assert [message.loaded.step for message in story if message.HasField("loaded")] == [0, 10]
    whole = found["told"]
    assert steps_of(story) == steps_of(whole) and len(steps_of(story)) == 30
    assert story[-1].ended == whole[-1].ended and len(checkpoints_of(story)) == 3
    assert checkpoints_of(story) == checkpoints_of(whole)
    assert not running_ranks()
