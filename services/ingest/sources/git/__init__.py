"""Git repositories and bundles: fetched bare and shallow, read object by object, never checked out.

The repository is hostile until proven otherwise: no hooks, no filters, no configuration but ours, only the transports
that are allowed, only addresses that were checked, and nothing of it is ever written to a path it chooses.
"""

from services.ingest.sources.git.fetch import Repository, fetch, moved, unbundle
from services.ingest.sources.git.remote import HttpsToken, Remote, Secret, SshKey, reach
from services.ingest.sources.git.submodules import MAX_DEPTH, MAX_SUBMODULES, find
from services.ingest.sources.git.tree import changes, read
from services.ingest.sources.git.urls import check_ref, check_url, place

__all__ = [
    "MAX_DEPTH",
    "MAX_SUBMODULES",
    "HttpsToken",
    "Remote",
    "Repository",
    "Secret",
    "SshKey",
    "changes",
    "check_ref",
    "check_url",
    "fetch",
    "find",
    "moved",
    "place",
    "reach",
    "read",
    "unbundle",
]
