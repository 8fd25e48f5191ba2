"""Cascade Mask R-CNN 3x on COCO with DiNAT_s-Base: box AP 52.6, mask AP 45.3
(its code's README). Hassani and Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/cascade_mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="dinat_s_base",
        dilations="coco",
        drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_base.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
