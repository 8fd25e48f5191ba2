"""Shared by all families: registry, base classes, checkpoints."""
