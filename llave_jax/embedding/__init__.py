"""Items to embeddings: the Embedder, embedding of whole files, exact search."""
