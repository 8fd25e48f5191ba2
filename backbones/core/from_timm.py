"""Models of timm by name, ``timm/NAME``, wherever ours are accepted."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
from torch import nn

from backbones.core.checkpoint import load_checkpoint

PREFIX = "timm/"


def create_timm_model(
    name: str, pretrained: bool, checkpoint_path: str | Path | None, **kwargs: Any
) -> nn.Module:
    """A model of timm.

    Args:
        name: ``timm/NAME`` or ``timm/NAME.TAG``, of ``timm.list_models()``.
        pretrained: load the weights that timm's hub has for it.
        checkpoint_path: load this file instead, saved from the same architecture.
        **kwargs: of ``timm.create_model``.

    Raises:
        ValueError: an unknown name or tag.
        CheckpointError: weights that do not fit.
    """
    plain = name.removeprefix(PREFIX)
    architecture, _, tag = plain.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
        hint = f"; did you mean {', '.join(repr(PREFIX + n) for n in near)}?" if near else ""
        raise ValueError(f"timm has no model {architecture!r}{hint}")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    tags = sorted(n.partition(".")[2] for n in tagged)
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        raise ValueError(f"timm has no weights {tag!r} of {architecture}; it has {known}")
    model = timm.create_model(plain, pretrained=pretrained, **kwargs)
    if checkpoint_path not in (None, ""):
        assert checkpoint_path is not None
        load_checkpoint(model, checkpoint_path)
    return model
