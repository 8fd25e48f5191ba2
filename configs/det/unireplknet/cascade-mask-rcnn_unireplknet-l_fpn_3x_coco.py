"""Cascade Mask R-CNN 3x on COCO with UniRepLKNet-L from ImageNet-22k: box AP 55.8, mask AP 48.4
(its code's README). Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/cascade_mask_rcnn_decay.py", "../_base_/coco_mask_3x.py", "../_base_/ema.py"]
model = dict(
    backbone=dict(
        name="unireplknet_l",
        drop_path_rate=0.7,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_l.in22k"),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
