"""Mask R-CNN 3x on COCO with VMamba-S[s2l15]: box AP 49.9, mask AP 44.2 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_3x_warm_up_1000.py"]
model = dict(
    backbone=dict(
        name="vmamba_small_s2l15",
        drop_path_rate=0.3,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vmamba_small_s2l15.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
