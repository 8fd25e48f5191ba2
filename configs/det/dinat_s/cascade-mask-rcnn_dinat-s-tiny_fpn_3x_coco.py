"""Cascade Mask R-CNN 3x on COCO with DiNAT_s-Tiny: box AP 51.0, mask AP 44.1
(its code's README). Hassani and Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/cascade_mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="dinat_s_tiny",
        dilations="coco",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_tiny.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
