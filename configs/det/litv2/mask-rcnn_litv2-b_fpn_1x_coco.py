"""Mask R-CNN 1x on COCO with LITv2-B: box AP 47.3, mask AP 42.6 (its code's README).
Pan et al., "Fast Vision Transformers with HiLo Attention", https://arxiv.org/abs/2205.13213."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="litv2_b",
        drop_path_rate=0.3,
        out_norms=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint="litv2_b.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
