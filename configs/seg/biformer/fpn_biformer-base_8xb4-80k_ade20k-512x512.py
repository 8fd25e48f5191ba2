"""Semantic FPN 80k on ADE20K with BiFormer-Base: mIoU 49.9 (its code's README).
Zhu et al., "BiFormer", https://arxiv.org/abs/2303.08810."""

_base_ = ["../_base_/fpn_cosine.py", "../_base_/ade20k.py", "../_base_/schedule_80k.py"]
model = dict(
    backbone=dict(
        name="biformer_base",
        drop_path_rate=0.3,
        n_win=8,
        init_cfg=dict(type="Pretrained", checkpoint="biformer_base.in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
train_dataloader = dict(batch_size=4)
