"""Semantic FPN 80k on ADE20K with InceptionNeXt-Tiny: the number is in the paper's tables and not
repeated here.
Yu et al., "InceptionNeXt", https://arxiv.org/abs/2303.16900."""

_base_ = ["../_base_/fpn.py", "../_base_/ade20k.py", "../_base_/schedule_80k.py"]
model = dict(
    backbone=dict(
        name="inception_next_tiny",
        init_cfg=dict(type="Pretrained", checkpoint="inception_next_tiny.sail_in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
