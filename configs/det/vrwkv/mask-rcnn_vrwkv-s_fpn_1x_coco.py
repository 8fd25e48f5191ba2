"""Mask R-CNN 1x on COCO with VRWKV-S: box AP 44.8, mask AP 40.2 (its code's README).
Duan et al., "Vision-RWKV", https://arxiv.org/abs/2403.02308."""

_base_ = ["../_base_/mask_rcnn_vrwkv.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="vrwkv_s",
        drop_path_rate=0.2,
        layer_scale=1e-5,
        init_cfg=dict(type="Pretrained", checkpoint="vrwkv_s.in1k"),
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
