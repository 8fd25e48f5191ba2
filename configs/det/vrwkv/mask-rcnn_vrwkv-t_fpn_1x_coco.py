"""Mask R-CNN 1x on COCO with VRWKV-T: box AP 41.7, mask AP 38.0 (its code's README).
Duan et al., "Vision-RWKV", https://arxiv.org/abs/2403.02308."""

_base_ = ["../_base_/mask_rcnn_vrwkv.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="vrwkv_t",
        drop_path_rate=0.1,
        layer_scale=1.0,
        init_cfg=dict(type="Pretrained", checkpoint="vrwkv_t.in1k"),
    ),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01))
