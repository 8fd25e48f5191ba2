"""Mask R-CNN 3x on COCO with NAT-Small: box AP 48.4, mask AP 43.2
(its code's README). Hassani et al., "Neighborhood Attention Transformer",
https://arxiv.org/abs/2204.07143."""

_base_ = ["../_base_/mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="nat_small",
        drop_path_rate=0.35,
        init_cfg=dict(type="Pretrained", checkpoint="nat_small.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
