"""The server: HTTP in front of an `Embedder` and, where there is one, of an index."""
