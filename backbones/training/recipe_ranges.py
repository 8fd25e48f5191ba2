"""The ranges of all numbers in a recipe, shown by ``--help`` and checked on loading."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backbones.common.errors import RecipeError
from backbones.core.messages import shown

__all__ = ["RANGES", "Range", "check_ranges"]


@dataclass(frozen=True)
class Range:
    """The allowed range of a number, of the numbers in a list, or of a mapping's values.

    Attributes:
        low, high: inclusive bounds.
        above, below: exclusive bounds, instead of ``low`` or ``high``.
        counts: allowed lengths of a list; empty for any.
        rising: the numbers of a list must increase.
        keys: the range of a mapping's keys.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    counts: Sequence[int] = ()
    rising: bool = False
    keys: Range | None = None

    def holds(self, value: Any) -> bool:
        """Whether ``value``, a number, a list of numbers or a mapping to numbers, is in range."""
        if isinstance(value, dict):
            keys = self.keys or Range()
            return all(map(keys.holds, value)) and all(map(self.holds, value.values()))
        if isinstance(value, tuple):
            if self.counts and len(value) not in self.counts:
                return False
            if self.rising and any(a >= b for a, b in zip(value, value[1:], strict=False)):
                return False
            return all(map(self.holds, value))
        # NaN fails the comparisons, an infinite value those with the finite ends of the table.
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        ends = (
            (self.low, "at least"),
            (self.above, "above"),
            (self.high, "at most"),
            (self.below, "below"),
        )
        text = " and ".join(f"{word} {end:.10g}" for end, word in ends if math.isfinite(end))
        if math.isfinite(self.low) and math.isfinite(self.high):
            text = f"within {self.low:.10g} … {self.high:.10g}"
        if self.keys is not None:
            text = f"{text} from an epoch on that is {self.keys}"
        if self.rising:
            text = f"{text}, each above the one before"
        if self.counts:
            count = " or ".join(map(str, self.counts))
            text = f"{count} number{'s' if self.counts != (1,) else ''} {text}"
        return text


_SHARE = Range(low=0, high=1)
_SHARE_BELOW_1 = Range(low=0, below=1)
_COUNT = Range(low=1, high=10**6)
_EPOCHS_OR_0 = Range(low=0, high=10**6)
_PIXELS = Range(low=1, high=2**14)
_RATE = Range(low=0, high=1000)

RANGES: dict[str, Range] = {
    # --- the model
    "num_classes": _COUNT,
    "drop": _SHARE_BELOW_1,
    "drop_path": _SHARE_BELOW_1,
    # --- the data
    "num_samples": Range(low=1, high=10**12),
    "val_num_samples": Range(low=1, high=10**12),
    "batch_size": _COUNT,
    "val_batch_size": _COUNT,
    "workers": Range(low=0, high=1024),
    "max_corrupt": _SHARE,
    # --- preprocessing
    "img_size": _PIXELS,
    "img_size_schedule": Range(low=1, high=2**14, keys=_EPOCHS_OR_0),
    "crop_pct": Range(low=0.1, high=1),
    "mean": _SHARE,
    "std": Range(low=1e-3, high=10),
    # --- augmentation
    "scale": Range(above=0, high=1, counts=(2,), rising=True),
    "ratio": Range(low=0.01, high=100, counts=(2,), rising=True),
    "hflip": _SHARE,
    "vflip": _SHARE,
    "color_jitter": Range(low=0, high=10),
    "grayscale_prob": _SHARE,
    "gaussian_blur_prob": _SHARE,
    "reprob": _SHARE,
    "recount": Range(low=1, high=100),
    "aug_repeats": Range(low=0, high=100),
    "mixup": Range(low=0, high=1000),
    "cutmix": Range(low=0, high=1000),
    "cutmix_minmax": Range(low=0, high=1, counts=(2,), rising=True),
    "mixup_prob": _SHARE,
    "mixup_switch_prob": _SHARE,
    "mixup_off_epoch": _EPOCHS_OR_0,
    # --- the loss
    "smoothing": _SHARE_BELOW_1,
    "bce_target_thresh": _SHARE,
    "aux_weight": Range(low=0, high=1000),
    "attn_diversity": Range(low=0, high=1000),
    # --- a teacher
    "teacher_img_size": _PIXELS,
    "distill_alpha": _SHARE,
    "distill_temperature": Range(low=0.01, high=1000),
    "ofa_gamma": Range(low=1, high=100),
    "ofa_stages": Range(low=-100, high=100),
    # --- the optimizer
    "lr": _RATE,
    "lr_base": _RATE,
    "lr_base_size": Range(low=1, high=10**9),
    "weight_decay": Range(low=0, high=100),
    "momentum": _SHARE_BELOW_1,
    "opt_eps": Range(above=0, high=1),
    "opt_betas": Range(low=0, below=1, counts=(1, 2, 3)),
    "layer_decay": Range(above=0, high=1),
    "clip_grad": Range(above=0, high=10**9),
    "accum_steps": _COUNT,
    # --- the schedule
    "epochs": _COUNT,
    "warmup_epochs": _EPOCHS_OR_0,
    "warmup_lr": _RATE,
    "cooldown_epochs": _EPOCHS_OR_0,
    "min_lr": _RATE,
    "decay_epochs": Range(above=0, high=10**6),
    "decay_milestones": Range(low=1, high=10**6, rising=True),
    "decay_rate": Range(above=0, high=10),
    "patience_epochs": _EPOCHS_OR_0,
    "lr_cycle_limit": Range(low=1, high=1000),
    "lr_cycle_mul": Range(low=1, high=100),
    "lr_cycle_decay": _SHARE,
    "lr_k_decay": Range(above=0, high=10),
    # --- the moving average of the weights
    "ema_decay": _SHARE_BELOW_1,
    # --- speed
    "threads": Range(low=1, high=1024),
    # --- the run
    "seed": Range(low=0, high=2**31 - 1),
    "save_every_steps": Range(low=0, high=10**9),
    "save_every_minutes": Range(low=0, high=10**6),
    "eval_every": _COUNT,
    "log_every": Range(low=1, high=10**9),
    "max_bad_steps": _COUNT,
}
"""Ranges by key. ``None`` is always allowed if the key's type includes it."""


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Reject the first of ``values`` that is out of range.

    Raises:
        RecipeError: names the key, its value and the range.
    """
    for name, span in ranges.items():
        value = values.get(name)
        if value is not None and not span.holds(value):
            raise RecipeError(f"{name} must be {span}, not {shown(value)}")
