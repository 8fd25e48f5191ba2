"""RetinaNet 1x on COCO with VAN-B0: box AP 38.8 (table 9 of the paper).
Guo et al., "Visual Attention Network", https://arxiv.org/abs/2202.09741."""

_base_ = ["../_base_/retinanet.py", "../_base_/coco_box_1x.py"]
model = dict(
    backbone=dict(
        name="van_b0", norm_eps=1e-5, init_cfg=dict(type="Pretrained", checkpoint="van_b0.in1k")
    ),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
