"""UPerNet 160k on ADE20K with NAT-Base: mIoU 48.5 (its code's README).
Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143."""

_base_ = ["../_base_/upernet_nat.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="nat_base",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="nat_base.in1k"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
