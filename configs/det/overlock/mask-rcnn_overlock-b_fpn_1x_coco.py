"""Mask R-CNN 1x on COCO with OverLoCK-B: box AP 49.9, mask AP 44.4 (its code's README).
Lou and Yu, "OverLoCK", https://arxiv.org/abs/2502.20087."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="overlock_b",
        out_norms=True,
        overview_feature=True,
        drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="overlock_b.in1k"),
    ),
    neck=dict(in_channels=[80, 160, 528, 720]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
