"""Attention of the published backbones, each usable alone as a function and as a module."""
