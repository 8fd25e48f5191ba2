"""RetinaNet 1x on COCO with RAVLT-T: box AP 45.9 (its code's README).
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635."""

_base_ = ["../_base_/retinanet.py", "../_base_/coco_box_1x.py"]
model = dict(
    backbone=dict(
        name="ravlt_t", out_norms=True, init_cfg=dict(type="Pretrained", checkpoint="ravlt_t.in1k")
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
