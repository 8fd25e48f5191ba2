"""RetinaNet 1x on COCO with SHViT-S4: box AP 38.8 (its code's README).
Yun and Ro, "SHViT", https://arxiv.org/abs/2401.16456."""

_base_ = ["../_base_/retinanet_transposed.py", "../_base_/coco_box_1x.py"]
model = dict(
    backbone=dict(name="shvit_s4", init_cfg=dict(type="Pretrained", checkpoint="shvit_s4.in1k")),
    neck=dict(in_channels=[224, 336, 448]),
)
