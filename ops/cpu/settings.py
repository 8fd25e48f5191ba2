"""Environment variables that say which kernels may be used."""

from __future__ import annotations

import os

SWITCH = "VISION_BACKBONES_NATIVE"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class SettingError(ValueError):
    """An environment variable has an invalid value; the message lists the valid ones."""


def is_switched_on() -> bool:
    """Whether the environment allows kernels to be compiled and loaded.

    Raises:
        SettingError: ``VISION_BACKBONES_NATIVE`` is neither a yes nor a no.
    """
    chosen = os.environ.get(SWITCH, "")
    word = chosen.strip().lower()
    if word not in ("", *_YES, *_NO):
        raise SettingError(f"{SWITCH} must be one of {[*_YES, *_NO]}, got {chosen!r}")
    return word not in _NO
