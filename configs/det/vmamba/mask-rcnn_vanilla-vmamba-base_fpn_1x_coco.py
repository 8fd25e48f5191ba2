"""Mask R-CNN 1x on COCO with Vanilla VMamba-B: box AP 48.6, mask AP 43.3 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x_warm_up_1000.py"]
model = dict(
    backbone=dict(
        name="vanilla_vmamba_base",
        drop_path_rate=0.1,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vanilla_vmamba_base.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
