"""Mask R-CNN 1x on COCO with BiFormer-Small: box AP 47.8.
Zhu et al., "BiFormer", https://arxiv.org/abs/2303.08810."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="biformer_small",
        n_win=16,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="biformer_small.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
