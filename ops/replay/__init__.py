"""Capture and replay of pieces of networks: capture → graph → memory plan → replay."""
