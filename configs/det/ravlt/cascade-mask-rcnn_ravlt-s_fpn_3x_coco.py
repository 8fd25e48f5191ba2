"""Cascade Mask R-CNN 3x on COCO with RAVLT-S: box AP 54.2, mask AP 46.8 (its code's README).
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635."""

_base_ = ["../_base_/cascade_mask_rcnn.py", "../_base_/coco_mask_3x.py"]
model = dict(
    backbone=dict(
        name="ravlt_s", out_norms=True, init_cfg=dict(type="Pretrained", checkpoint="ravlt_s.in1k")
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
