"""The ingest service: sources become immutable snapshots."""
