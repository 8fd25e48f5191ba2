"""Semantic FPN 80k on ADE20K with RAVLT-B: mIoU 51.9 (its code's README).
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635."""

_base_ = ["../_base_/fpn.py", "../_base_/ade20k.py", "../_base_/schedule_80k.py"]
model = dict(
    backbone=dict(
        name="ravlt_b", out_norms=True, init_cfg=dict(type="Pretrained", checkpoint="ravlt_b.in1k")
    ),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
