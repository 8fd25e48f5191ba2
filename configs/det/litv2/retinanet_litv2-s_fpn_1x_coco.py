"""RetinaNet 1x on COCO with LITv2-S: box AP 44.0 (its code's README).
Pan et al., "Fast Vision Transformers with HiLo Attention", https://arxiv.org/abs/2205.13213."""

_base_ = ["../_base_/retinanet.py", "../_base_/coco_box_1x.py"]
model = dict(
    backbone=dict(
        name="litv2_s",
        drop_path_rate=0.2,
        out_norms=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint="litv2_s.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
