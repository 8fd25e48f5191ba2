"""Mask R-CNN 1x on COCO with VMamba-B[s2l15]: box AP 49.2, mask AP 44.1 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x_warm_up_1000.py"]
model = dict(
    backbone=dict(
        name="vmamba_base_s2l15",
        drop_path_rate=0.6,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vmamba_base_s2l15.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
