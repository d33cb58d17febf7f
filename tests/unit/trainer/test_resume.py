"""The states that are kept for a later attempt."""

from __future__ import annotations

from pathlib import Path

from codegraft.trainer.v1.checkpoint_pb2 import TrainStateManifest
from codegraft.trainer.v1.training_pb2 import CheckpointWritten
from services.core.runtime import Runtime
from services.trainer.launch.folder import files_in
from services.trainer.run.resume import States

RUN = "projects/p/runs/r"


def written(folder: Path, step: int) -> CheckpointWritten:
    path = folder / str(step)
    path.mkdir(exist_ok=True)
    (path / "state.json").write_text(f"state of step {step}")
    return CheckpointWritten(step=step, state_path=str(path))


async def kept(runtime: Runtime) -> list[str]:
    return [key.removeprefix(f"{RUN}/states/") async for key in runtime.store.list(f"{RUN}/states/")]


async def test_only_the_newest_state_stays(tmp_path: Path) -> None:
    runtime = Runtime.memory()
    states = States(runtime, RUN)
    assert await states.newest() is None
    await states.keep(CheckpointWritten(step=0))  # before the first step there is none
    assert await states.newest() is None
    for step in (3, 6, 12):
        await states.keep(written(tmp_path, step))
        assert await kept(runtime) == [f"{step}/manifest.json"]
    found = await States(runtime, RUN).newest()
    assert found is not None and (found / "state.json").read_text() == "state of step 12"


async def test_what_a_killed_attempt_left_goes_too(tmp_path: Path) -> None:
    """It was killed after it kept a state, and before it dropped the one before."""
    runtime = Runtime.memory()
    for step in (3, 6):
        manifest = TrainStateManifest(name=f"{RUN}/states/{step}", step=step)
        files = files_in(Path(written(tmp_path, step).state_path))
        await runtime.artifacts.commit(manifest.name, manifest, files)
    await States(runtime, RUN).keep(written(tmp_path, 9))
    assert await kept(runtime) == ["9/manifest.json"]
