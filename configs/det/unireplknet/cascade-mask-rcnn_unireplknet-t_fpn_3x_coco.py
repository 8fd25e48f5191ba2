"""Cascade Mask R-CNN 3x on COCO with UniRepLKNet-T: box AP 51.7, mask AP 44.9
(its code's README). Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/cascade_mask_rcnn_decay.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="unireplknet_t",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_t.in1k"),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
