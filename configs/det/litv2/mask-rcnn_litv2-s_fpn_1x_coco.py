"""Mask R-CNN 1x on COCO with LITv2-S: box AP 44.9, mask AP 40.8 (its code's README).
Pan et al., "Fast Vision Transformers with HiLo Attention", https://arxiv.org/abs/2205.13213."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="litv2_s",
        drop_path_rate=0.2,
        out_norms=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint="litv2_s.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
