"""RetinaNet 1x on COCO with LITv2-B: box AP 46.7 (its code's README).
Pan et al., "Fast Vision Transformers with HiLo Attention", https://arxiv.org/abs/2205.13213."""

_base_ = ["../_base_/retinanet.py", "../_base_/coco_box_1x.py"]
model = dict(
    backbone=dict(
        name="litv2_b",
        drop_path_rate=0.3,
        out_norms=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint="litv2_b.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
