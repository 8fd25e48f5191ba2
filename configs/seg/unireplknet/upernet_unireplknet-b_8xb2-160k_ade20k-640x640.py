"""UPerNet 160k on ADE20K with UniRepLKNet-B from ImageNet-22k: mIoU 53.5 (its code's README).
Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/upernet_decay_640.py", "../_base_/ade20k_640.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="unireplknet_b",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_b.in22k_ft_in1k_384"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9))
