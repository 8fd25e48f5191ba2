"""Semantic FPN 80k on ADE20K with BiFormer-Small: mIoU 48.9 (its code's README).
Zhu et al., "BiFormer", https://arxiv.org/abs/2303.08810."""

_base_ = ["../_base_/fpn_cosine.py", "../_base_/ade20k.py", "../_base_/schedule_80k.py"]
model = dict(
    backbone=dict(
        name="biformer_small",
        drop_path_rate=0.15,
        n_win=8,
        init_cfg=dict(type="Pretrained", checkpoint="biformer_small.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=4)
