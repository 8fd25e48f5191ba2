"""``fuse()`` and the classes of fused models."""
