"""RetinaNet 1x on COCO with BiFormer-Base: box AP 47.1 (its code's README).
Zhu et al., "BiFormer", https://arxiv.org/abs/2303.08810."""

_base_ = ["../_base_/retinanet.py", "../_base_/coco_box_1x.py"]
model = dict(
    backbone=dict(
        name="biformer_base",
        drop_path_rate=0.3,
        n_win=16,
        out_norms=True,
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="biformer_base.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
