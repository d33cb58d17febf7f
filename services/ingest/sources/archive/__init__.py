"""Archives, streamed member by member. Nothing is extracted by name, so that no name can do harm.

The readers of tar and zip are our own: the standard library's keep every header, believe sizes before they look, take a
damaged header in the middle for the end, and loop on crafted ones (CVE-2019-20907, CVE-2024-0450, CVE-2025-4517,
CVE-2025-8194). Decompression is the libraries'.
"""

from services.ingest.sources.archive.read import is_archive, read

__all__ = ["is_archive", "read"]
