"""Mask R-CNN 1x on COCO with BiFormer-Small: box AP 47.8, mask AP 43.2 (its code's README).
Zhu et al., "BiFormer", https://arxiv.org/abs/2303.08810."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_mask_1x.py"]
model = dict(
    backbone=dict(
        name="biformer_small",
        drop_path_rate=0.2,
        n_win=16,
        out_norms=True,
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="biformer_small.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
