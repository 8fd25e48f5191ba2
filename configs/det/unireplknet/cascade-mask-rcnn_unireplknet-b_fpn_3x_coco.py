"""Cascade Mask R-CNN 3x on COCO with UniRepLKNet-B from ImageNet-22k: box AP 54.8, mask AP 47.4
(its code's README). Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/cascade_mask_rcnn_decay.py", "../_base_/coco_mask_3x.py", "../_base_/ema.py"]
model = dict(
    backbone=dict(
        name="unireplknet_b",
        drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_b.in22k"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
