"""Mask R-CNN 3x on COCO with DiNAT_s-Small: box AP 48.6, mask AP 43.5
(its code's README). Hassani and Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="dinat_s_small",
        dilations="coco",
        drop_path_rate=0.35,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_small.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
