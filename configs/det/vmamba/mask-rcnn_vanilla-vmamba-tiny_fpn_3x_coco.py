"""Mask R-CNN 3x on COCO with Vanilla VMamba-T: box AP 48.5, mask AP 43.2 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_3x_warm_up_1000.py"]
model = dict(
    backbone=dict(
        name="vanilla_vmamba_tiny",
        drop_path_rate=0.1,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vanilla_vmamba_tiny.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
