"""Mask R-CNN 1x on COCO with VMamba-T[s1l8]: box AP 47.3, mask AP 42.7 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x_warm_up_1000.py"]
model = dict(
    backbone=dict(
        name="vmamba_tiny_s1l8",
        drop_path_rate=0.2,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vmamba_tiny_s1l8.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
