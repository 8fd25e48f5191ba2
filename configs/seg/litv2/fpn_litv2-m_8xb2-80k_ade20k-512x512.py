"""Semantic FPN 80k on ADE20K with LITv2-M: mIoU 45.7 (its code's README).
Pan et al., "Fast Vision Transformers with HiLo Attention", https://arxiv.org/abs/2205.13213."""

_base_ = ["../_base_/fpn.py", "../_base_/ade20k.py", "../_base_/schedule_80k.py"]
model = dict(
    backbone=dict(
        name="litv2_m",
        drop_path_rate=0.2,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="litv2_m.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=0, by_epoch=False)]
