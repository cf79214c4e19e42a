"""Retrieval: embeddings, the memory bank, and which of its documents to use."""
