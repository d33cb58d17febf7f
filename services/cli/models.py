"""``codegraft models``: the base models that can be fine-tuned."""

from __future__ import annotations

from codegraft.common.v1.model_pb2 import ModelFunction
from services.cli.connect import connect
from services.cli.output import Json, print_json, print_table


def models(json: Json = False) -> None:
    """List the base models of the catalogue."""
    with connect() as client:
        found = list(client.models.list())
    if json:
        print_json(found)
        return
    rows = [
        [
            model.id,
            model.title,
            model.parameters,
            model.context_length,
            ", ".join(ModelFunction.Name(f).removeprefix("MODEL_FUNCTION_").lower() for f in model.functions),
            model.cached,
        ]
        for model in found
    ]
    print_table(["MODEL", "TITLE", "PARAMETERS", "CONTEXT", "FUNCTIONS", "CACHED"], rows, empty="no model")
