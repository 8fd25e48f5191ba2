"""The stand-in for mmcv's compiled operators: hand-worked cases, and that it keeps away."""

from __future__ import annotations

import sys

import mmcv
import pytest
import torch
import torchvision
from mmcv.ops import RoIAlign, nms, sigmoid_focal_loss, soft_nms
from torch.nn import functional as F

from backbones.openmmlab import mmcv_ops


def test_nms_by_hand():
    """The second box overlaps the first by 80 of 120 (IoU 2/3), the third by 20 of 180 (1/9)."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [8, 0, 18, 10]])
    scores = torch.tensor([0.8, 0.9, 0.7])
    kept, order = nms(boxes, scores, 0.6)
    assert order.tolist() == [1, 2]
    assert torch.equal(kept, torch.cat([boxes, scores[:, None]], 1)[[1, 2]])
    assert nms(boxes, scores, 0.7)[1].tolist() == [1, 0, 2]


def test_nms_counts_edges_as_inside_with_offset():
    """Neighbours that share an edge: IoU 0, but with widths one more 11 of 231."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10]])
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.04, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.04, offset=1)[1].tolist() == [0]
    assert nms(boxes, scores, 0.05, offset=1)[1].tolist() == [0, 1]


def test_roi_align_by_hand():
    """On a ramp of x + 10 y, a cell's average is the value at its centre."""
    image = (torch.arange(8.0) + 10 * torch.arange(8.0)[:, None])[None, None].requires_grad_()
    rois = torch.tensor([[0.0, 1, 2, 5, 6]])
    out = RoIAlign(2, spatial_scale=1.0, sampling_ratio=2)(image, rois)
    # Cells are 2×2; pixel centres are at half-integers, hence the −0.5.
    expected = torch.tensor([[[[1.5 + 25, 3.5 + 25], [1.5 + 45, 3.5 + 45]]]])
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert image.grad is not None
    torch.testing.assert_close(image.grad.sum(), torch.tensor(4.0))
    torch.testing.assert_close(image.grad[0, 0, 3, 2], torch.tensor(0.25))
    assert image.grad[0, 0, 7].abs().max() == 0


def test_bfloat16():
    """As under mixed precision: the numbers of float32, rounded; small integers are exact."""
    image = (torch.arange(8.0) + 8 * torch.arange(8.0)[:, None])[None, None]
    rois = torch.tensor([[0.0, 1, 2, 5, 6]])
    outs, grads = [], []
    for kind in (torch.float32, torch.bfloat16):
        x = image.to(kind, copy=True).requires_grad_()
        out = RoIAlign(2, spatial_scale=1.0, sampling_ratio=2)(x, rois.to(kind))
        out.sum().backward()
        assert x.grad is not None and out.dtype is x.grad.dtype is kind
        outs.append(out.detach())
        grads.append(x.grad)
    assert torch.equal(outs[1], outs[0].bfloat16()) and torch.equal(grads[1], grads[0].bfloat16())
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [8, 0, 18, 10]]).bfloat16()
    assert nms(boxes, torch.tensor([0.8, 0.9, 0.7]).bfloat16(), 0.6)[1].tolist() == [1, 2]


def test_roi_align_takes_no_maximum():
    with pytest.raises(NotImplementedError, match="pool_mode='avg'"):
        RoIAlign(2, pool_mode="max")(torch.ones(1, 1, 8, 8), torch.tensor([[0.0, 1, 1, 5, 5]]))


def test_focal_loss_by_definition():
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-0.4, 0.1]], requires_grad=True)
    target = torch.tensor([0, 1, 2])  # the last one is background
    weight = torch.tensor([2.0, 3.0])
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "sum")
    p, hot = logits.sigmoid(), F.one_hot(target, 3)[:, :2]
    expected = torch.where(hot == 1, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    expected = (expected * torch.tensor([[2.0], [3.0], [1.0]])).sum()
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits)[0])


def test_other_operators_explain_themselves():
    with pytest.raises(NotImplementedError, match="'softnms' needs its compiled extension.*nms"):
        soft_nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]))


def test_compiled_operators_serve_gpus_and_maxima(tmp_path, monkeypatch):
    """On a CPU they lack bfloat16, and read channels-last maps as if these were contiguous."""
    (tmp_path / "_ext.py").write_text(
        "def roi_align_forward(x, *args, **options):\n    return x.is_contiguous()\n"
    )
    monkeypatch.setattr(mmcv, "__path__", [str(tmp_path), *mmcv.__path__])
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    assert not mmcv_ops.install() and not mmcv_ops.install()
    operator = sys.modules["mmcv._ext"].roi_align_forward
    x, out = torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last), torch.empty(1, 3, 1, 1)
    whole = (torch.tensor([[0.0, 0, 0, 4, 4]]), out, None, None)
    options = {"aligned_height": 1, "aligned_width": 1, "spatial_scale": 1.0, "sampling_ratio": 4}
    assert operator(x, *whole, **options, pool_mode=1, aligned=False) is None
    torch.testing.assert_close(out, torchvision.ops.roi_align(x, whole[0], 1, 1.0, 4))
    assert operator(x, pool_mode=0) and operator(x.to("meta"), pool_mode=1)
