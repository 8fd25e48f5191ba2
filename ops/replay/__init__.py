"""Capture and replay of modules: capture → graph → memory plan → replay."""
