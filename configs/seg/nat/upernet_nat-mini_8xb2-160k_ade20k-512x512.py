"""UPerNet 160k on ADE20K with NAT-Mini: mIoU 45.1 (its code's README).
Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143."""

_base_ = ["../_base_/upernet_nat.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="nat_mini",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="nat_mini.in1k"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
