"""Cascade Mask R-CNN 3x on COCO with RAVLT-B: box AP 55.3, mask AP 47.7 (its code's README).
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635."""

_base_ = ["../_base_/cascade_mask_rcnn.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="ravlt_b", out_norms=True, init_cfg=dict(type="Pretrained", checkpoint="ravlt_b.in1k")
    ),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
