"""Semantic FPN 80k on ADE20K with FaViT-B2: no published weights or number to compare with.
Qin et al., "Factorization Vision Transformer", https://arxiv.org/abs/2312.08614."""

_base_ = ["../_base_/fpn.py", "../_base_/ade20k.py", "../_base_/schedule_80k.py"]
model = dict(
    backbone=dict(name="favit_b2"),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
