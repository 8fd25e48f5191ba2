"""Image restoration from picture to picture; never imported by ``import backbones``."""
