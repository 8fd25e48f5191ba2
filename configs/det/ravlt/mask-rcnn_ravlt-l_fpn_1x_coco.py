"""Mask R-CNN 1x on COCO with RAVLT-L: box AP 52.3, mask AP 46.4 (its code's README).
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="ravlt_l", out_norms=True, init_cfg=dict(type="Pretrained", checkpoint="ravlt_l.in1k")
    ),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
