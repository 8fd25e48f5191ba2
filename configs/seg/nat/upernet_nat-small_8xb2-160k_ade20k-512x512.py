"""UPerNet 160k on ADE20K with NAT-Small: mIoU 48.0 (its code's README).
Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143."""

_base_ = ["../_base_/upernet_nat.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="nat_small",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="nat_small.in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
