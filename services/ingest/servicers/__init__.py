"""The gRPC services of ingest, one a file: requests in, tables and domain functions, responses out."""
