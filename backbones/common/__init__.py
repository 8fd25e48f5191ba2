"""Shared by all other packages: files, errors, messages, progress, memory, images."""
