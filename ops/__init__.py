"""Shared building blocks: stateless ops on tensors and the layers that own their parameters."""

# `backbones` looks for this name: a package on PyPI is called `ops` too.
OPS_OF_VISION_BACKBONES = True
