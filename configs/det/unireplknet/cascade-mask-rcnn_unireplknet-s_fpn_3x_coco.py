"""Cascade Mask R-CNN 3x on COCO with UniRepLKNet-S: box AP 53.0, mask AP 45.9
(its code's README). Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/cascade_mask_rcnn_decay.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="unireplknet_s",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_s.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
