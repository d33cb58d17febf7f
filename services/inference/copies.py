"""Copies of the serving policies in the object store, for `codegraft rebuild` (services/core/state/mirror.py)."""

from __future__ import annotations

from codegraft.inference.v1.serving_pb2 import Serving
from services.core.state import Table
from services.core.state.mirror import Mirror
from services.core.store import ObjectStore
from services.inference.policy import decided

FIELDS = (
    "name",
    "mode",
    "pinned_checkpoint",
    "wanted_checkpoint",
    "wanted_sha256",
    "wanted_test_loss",
    "wanted_test_set",
    "waiting_checkpoint",
    "waiting_sha256",
    "waiting_test_loss",
    "previous_checkpoint",
    "split",
    "history",
    "update_time",
    "decided",
)


def mirror(table: Table[Serving], store: ObjectStore) -> Mirror[Serving]:
    """The mirror of all policies.

    After NATS has lost them, the first completion makes a policy of its own, which nobody wanted: it must not take the
    place of what a person had decided, before that is rebuilt.
    """
    return Mirror(
        "inference",
        Serving,
        table,
        store,
        fields=FIELDS,
        precedes=lambda there, record: decided(there) and not decided(record),
    )
