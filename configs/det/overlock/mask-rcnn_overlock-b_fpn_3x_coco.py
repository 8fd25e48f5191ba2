"""Mask R-CNN 3x on COCO with OverLoCK-B: box AP 51.4, mask AP 45.3 (its code's README).
Lou and Yu, "OverLoCK", https://arxiv.org/abs/2502.20087."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_3x.py"]
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
