"""Mask R-CNN 1x on COCO with VRWKV-B: box AP 46.8, mask AP 41.7 (its code's README).
Duan et al., "Vision-RWKV", https://arxiv.org/abs/2403.02308."""

_base_ = ["../_base_/mask_rcnn_vrwkv.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="vrwkv_b",
        drop_path_rate=0.3,
        adapter=dict(num_heads=12, value_ratio=0.5),
        init_cfg=dict(type="Pretrained", checkpoint="vrwkv_b.in1k"),
    ),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
