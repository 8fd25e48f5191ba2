"""Shared building blocks: stateless ops on tensors and the layers that own their parameters."""

# `backbones` checks for this name, since a package on PyPI is also called `ops`.
OPS_OF_VISION_BACKBONES = True
