"""Cascade Mask R-CNN 3x on COCO with DiNAT_s-Large from ImageNet-22k: box AP 54.8, mask AP 47.2
(its code's README). Hassani and Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/cascade_mask_rcnn_nat.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="dinat_s_large_21k",
        dilations="coco",
        drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_large_21k.in22k"),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
