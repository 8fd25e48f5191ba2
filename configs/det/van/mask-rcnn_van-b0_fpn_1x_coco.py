"""Mask R-CNN 1x on COCO with VAN-B0: box AP 40.2, mask AP 37.6 (table 10 of the paper).
Guo et al., "Visual Attention Network", https://arxiv.org/abs/2202.09741."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="van_b0", norm_eps=1e-5, init_cfg=dict(type="Pretrained", checkpoint="van_b0.in1k")
    ),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
