"""Semantic FPN 40k on a small medical set with MedViTV2-Tiny: no published number.
Manzari et al., "MedViTV2", https://arxiv.org/abs/2502.13693."""

_base_ = ["../_base_/fpn.py", "../_base_/medical.py", "../_base_/schedule_40k.py"]
model = dict(
    backbone=dict(
        name="medvitv2_tiny", init_cfg=dict(type="Pretrained", checkpoint="medvitv2_tiny.pretrain")
    ),
    neck=dict(in_channels=[64, 128, 192, 384]),
    decode_head=dict(num_classes=2),
    data_preprocessor=dict(size=(256, 256)),
)
