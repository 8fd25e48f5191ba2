"""Replacement of mmcv's compiled operators by torchvision's, where available.

``mmcv-lite`` lacks mmcv's extension ``mmcv._ext``, which mmdet imports anyway. This replacement
computes the same values; operators that torchvision lacks raise an error when called. Where mmcv
is compiled, torchvision's operators run on CPUs only: mmcv's lack bfloat16 and focal loss there,
and its RoIAlign reads channels-last maps as if they were contiguous, which gives wrong values.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torchvision.ops
from torch import Tensor
from torch.nn import functional as F

_NAME = "mmcv._ext"


def install() -> bool:
    """Install the replacement as ``mmcv._ext``, or inside a compiled extension for CPUs.

    Call it before ``mmcv.ops`` is imported. Returns whether mmcv is without its compiled extension.
    """
    present = sys.modules.get(_NAME)
    if present is None and importlib.util.find_spec(_NAME) is None:
        present = sys.modules[_NAME] = _StandIn(_NAME, __doc__)
        # mmengine uses the loader to detect whether mmcv is compiled, which it is not.
        present.__spec__ = ModuleSpec(_NAME, None)
    present = present or importlib.import_module(_NAME)
    if isinstance(present, _StandIn):
        return True
    for name in _OPERATORS.keys() & vars(present).keys():
        compiled = getattr(present, name)
        if not hasattr(compiled, "__wrapped__"):
            setattr(present, name, _for_cpus(_OPERATORS[name], compiled))
    return False


def _for_cpus(ours: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` for tensors on a CPU, unless it lacks the call; otherwise ``compiled``."""

    @functools.wraps(compiled)
    def operator(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_cpu and kwargs.get("pool_mode", 1) == 1:
            return ours(x, *args, **kwargs)
        return compiled(x.contiguous(), *args, **kwargs)

    return operator


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes (N, 4), best first; ``offset`` 1 includes the edge pixels."""
    if offset:
        bboxes = bboxes + bboxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(_known(bboxes), _known(scores), iou_threshold)


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **options: Any
) -> None:
    """RoIAlign of the regions (K, 5) of ``input`` (B, C, H, W), written to ``output``."""
    size, scale, ratio, aligned = _roi_options(**options)
    maps, regions = _known(input), _known(rois)
    output.copy_(torchvision.ops.roi_align(maps, regions, size, scale, ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    **options: Any,
) -> None:
    """Gradient of :func:`roi_align_forward`, written to ``grad_input``."""
    size, scale, ratio, aligned = _roi_options(**options)
    args = _known(grad_output), _known(rois), scale, *size, *grad_input.shape, ratio, aligned
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(*args))


def _roi_options(
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> tuple[tuple[int, int], float, int, bool]:
    if pool_mode != 1:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' needs mmcv's compiled operators; use pool_mode='avg'"
        )
    return (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of logits (N, C) and classes (N,), where C is background, written to ``output``.

    ``weight``, (C,) or empty, has the classes' weights; that of background is 1.
    """
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient of the sum of :func:`sigmoid_focal_loss_forward`, written to ``grad_input``."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
        grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Any:
    classes = logits.shape[1]
    one_hot = F.one_hot(target, classes + 1)[:, :classes].to(logits.dtype)
    loss = torchvision.ops.sigmoid_focal_loss(logits, one_hot, alpha, gamma)
    if weight.numel():
        loss = loss * F.pad(weight, (0, 1), value=1.0)[target].unsqueeze(1)
    return loss


def _known(x: Tensor) -> Tensor:
    """torchvision's operators have no kernels for bfloat16."""
    return x.float() if x.dtype is torch.bfloat16 else x


class _StandIn(ModuleType):
    """The module: the functions above, and explanatory errors for everything else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _OPERATORS.get(name) or _missing(name)


def _missing(name: str) -> Callable[..., None]:
    def operator(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"mmcv's operator {name!r} needs its compiled extension, and this mmcv has none. "
            f"Without it there are {', '.join(sorted(_OPERATORS))}; for the others install a "
            "compiled mmcv (the package onedl-mmcv, or a wheel of mmcv for your PyTorch)."
        )

    return operator


_OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": nms,
    "roi_align_forward": roi_align_forward,
    "roi_align_backward": roi_align_backward,
    "sigmoid_focal_loss_forward": sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": sigmoid_focal_loss_backward,
}
