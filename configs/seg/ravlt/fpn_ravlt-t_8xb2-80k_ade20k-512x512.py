"""Semantic FPN 80k on ADE20K with RAVLT-T: mIoU 47.9 (its code's README).
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635."""

_base_ = ["../_base_/fpn.py", "../_base_/ade20k.py", "../_base_/schedule_80k.py"]
model = dict(
    backbone=dict(
        name="ravlt_t", out_norms=True, init_cfg=dict(type="Pretrained", checkpoint="ravlt_t.in1k")
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
