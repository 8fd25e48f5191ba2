"""Mask R-CNN 1x on COCO with OverLoCK-S: box AP 49.4, mask AP 44.0 (its code's README).
Lou and Yu, "OverLoCK", https://arxiv.org/abs/2502.20087."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="overlock_s",
        out_norms=True,
        overview_feature=True,
        drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="overlock_s.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
