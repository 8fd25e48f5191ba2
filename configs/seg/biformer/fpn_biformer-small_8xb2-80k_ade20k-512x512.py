"""Semantic FPN 80k on ADE20K with BiFormer-Small: mIoU 48.9.
Zhu et al., "BiFormer", https://arxiv.org/abs/2303.08810."""

_base_ = ["../_base_/fpn.py", "../_base_/ade20k.py", "../_base_/schedule_80k.py"]
model = dict(
    backbone=dict(
        name="biformer_small",
        n_win=8,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="biformer_small.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
