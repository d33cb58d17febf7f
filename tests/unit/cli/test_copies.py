"""What copies of records bring back, and what they leave."""

from __future__ import annotations

from codegraft.inference.v1.serving_pb2 import SERVING_MODE_LATEST_BEST, SERVING_MODE_PINNED, Serving, Split
from codegraft.ingest.v1.source_pb2 import SOURCE_STATE_PENDING
from services.cli.control import copies

RUN = "projects/p/runs/r"
THERE = {f"{RUN}/checkpoints/{step}" for step in (1, 2)}
AWAY = f"{RUN}/checkpoints/9"


def policy(mode: int, **parts: object) -> Serving:
    return Serving(name="projects/p/serving", mode=mode, **parts)  # type: ignore[arg-type]


def test_copies_are_told_from_other_objects_and_from_damaged_ones() -> None:
    made = copies.read(
        [
            ("records/ingest/Project/projects/p.json", b'{"name": "projects/p", "title": "Acme", "of_later": 1}'),
            ("records/ingest/Project/projects/gone.json", b"{}\n"),
            ("records/ingest/Source/projects/p/sources/a.json", b'{"name": "projects/p/sources/a", "commit": "c"}'),
            ("records/ingest/Source/projects/p/sources/b.json", b'{"name": '),
            ("records/ingest/Source/projects/gone/sources/a.json", b'{"name": "projects/gone/sources/a"}'),
            ("records/inference/Serving/projects/p/serving.json", b'{"name": "projects/p/serving"}'),
            ("records/inference/Serving/projects/gone/serving.json", b'{"name": "projects/gone/serving"}'),
            ("records/inference/doctor/1234", b"x"),
            ("records/later/Thing/projects/p.json", b"\xff"),
        ]
    )
    assert [(one.name, one.title) for one in made.projects] == [("projects/p", "Acme")]
    assert made.deleted == {"projects/gone"}
    [source] = made.sources
    assert (source.name, source.state, source.generation) == ("projects/p/sources/a", SOURCE_STATE_PENDING, 1)
    assert source.commit == "c" and not source.fetched_generation
    assert [one.name for one in made.policies] == ["projects/p/serving"]
    assert made.unreadable == ["records/ingest/Source/projects/p/sources/b.json"]


def test_a_policy_that_follows_the_best_forgets_versions_that_are_lost() -> None:
    """Else it would wait for one that is better than what nobody has."""
    best = policy(
        SERVING_MODE_LATEST_BEST,
        wanted_checkpoint=AWAY,
        wanted_sha256="9",
        wanted_test_loss=0.1,
        wanted_test_set="t",
        waiting_checkpoint=f"{RUN}/checkpoints/2",
        waiting_sha256="2",
        previous_checkpoint=AWAY,
    )
    assert copies.fitting(best, THERE) == []
    kept = {"waiting_checkpoint": f"{RUN}/checkpoints/2", "waiting_sha256": "2"}
    assert best == policy(SERVING_MODE_LATEST_BEST, **kept)


def test_what_a_person_chose_and_is_lost_is_told_and_stays() -> None:
    chosen = policy(SERVING_MODE_PINNED, pinned_checkpoint=AWAY, wanted_checkpoint=AWAY, wanted_sha256="9")
    chosen.split.CopyFrom(Split(checkpoint=f"{RUN}/checkpoints/1", percent=5))
    before = Serving.FromString(chosen.SerializeToString())
    assert copies.fitting(chosen, THERE) == [AWAY] and chosen == before
    assert copies.fitting(chosen, {*THERE, AWAY}) == []
