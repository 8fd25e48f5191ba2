"""Mask R-CNN 1x on COCO with OverLoCK-T: box AP 48.3, mask AP 43.3 (its code's README).
Lou and Yu, "OverLoCK", https://arxiv.org/abs/2502.20087."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="overlock_t",
        out_norms=True,
        overview_feature=True,
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="overlock_t.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 384, 640]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
