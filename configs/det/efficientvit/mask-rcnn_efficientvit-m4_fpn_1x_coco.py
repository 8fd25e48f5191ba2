"""Mask R-CNN 1x on COCO with EfficientViT-M4: mask AP 31.0 (its code's README).
Liu et al., "EfficientViT", https://arxiv.org/abs/2305.07027."""

_base_ = ["../_base_/mask_rcnn_transposed.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="efficientvit_m4",
        img_size=448,
        init_cfg=dict(type="Pretrained", checkpoint="efficientvit_m4.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 384]),
)
