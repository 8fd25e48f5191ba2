"""Embeddings of many images: compute them, store them in tables, search and evaluate them."""

from backbones.embedding.run import embed

__all__ = ["embed"]
