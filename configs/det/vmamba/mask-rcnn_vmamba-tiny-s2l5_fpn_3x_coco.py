"""Mask R-CNN 3x on COCO with VMamba-T[s2l5]: box AP 48.9, mask AP 43.7 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_3x_warm_up_1000.py"]
model = dict(
    backbone=dict(
        name="vmamba_tiny_s2l5",
        drop_path_rate=0.2,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vmamba_tiny_s2l5.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
