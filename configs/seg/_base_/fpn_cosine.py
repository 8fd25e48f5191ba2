"""Semantic FPN with a cosine schedule of 80 000 iterations; AdamW 2e-4.

As in the configs published with BiFormer, https://arxiv.org/abs/2303.08810.
"""

_base_ = ["./fpn.py"]

model = dict(backbone=dict(out_norms=True))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", T_max=80000, eta_min=0.0, by_epoch=False, begin=0, end=80000),
]
