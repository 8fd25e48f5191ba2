"""Cascade Mask R-CNN 3x on COCO with DiNAT-Mini: box AP 51.2, mask AP 44.4
(its code's README). Hassani and Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/cascade_mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="dinat_mini",
        dilations="coco",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
