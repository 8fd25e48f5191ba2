"""Mask R-CNN 3x on COCO with NAT-Tiny: box AP 47.7, mask AP 42.6
(its code's README). Hassani et al., "Neighborhood Attention Transformer",
https://arxiv.org/abs/2204.07143."""

_base_ = ["../_base_/mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="nat_tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="nat_tiny.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
