"""Cascade Mask R-CNN 3x on COCO with NAT-Small: box AP 52.0, mask AP 44.9
(its code's README). Hassani et al., "Neighborhood Attention Transformer",
https://arxiv.org/abs/2204.07143."""

_base_ = ["../_base_/cascade_mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="nat_small",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="nat_small.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
