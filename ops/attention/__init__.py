"""Attention operators of the published backbones, each as a function and as a module."""
