"""Image restoration; not imported by ``import backbones``."""
