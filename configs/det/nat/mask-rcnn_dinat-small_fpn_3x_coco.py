"""Mask R-CNN 3x on COCO with DiNAT-Small: box AP 49.3, mask AP 44.0
(its code's README). Hassani and Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="dinat_small",
        dilations="coco",
        drop_path_rate=0.35,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_small.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
