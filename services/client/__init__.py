"""The Python client of Codegraft: :class:`Codegraft` blocks, :class:`AsyncCodegraft` does not.

    from services.client import Codegraft

    with Codegraft.local() as codegraft:
        for project in codegraft.projects.list():
            print(project.name)

Needs no torch, NATS or S3. Failures are the exceptions of services/core/errors.py.
"""

from services.client.access import Access
from services.client.addresses import Addresses
from services.client.aio.client import AsyncCodegraft
from services.client.blocking.client import Codegraft
from services.client.pieces import Piece

__all__ = ["Access", "Addresses", "AsyncCodegraft", "Codegraft", "Piece"]
