"""Features of many images: computed, kept in tables, read again."""

from backbones.embedding.run import embed

__all__ = ["embed"]
