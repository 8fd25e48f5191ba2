"""UPerNet 160k on ADE20K with UniRepLKNet-S from ImageNet-22k: mIoU 51.9 (its code's README).
Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/upernet_decay.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="unireplknet_s",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_s.in22k_ft_in1k_384"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9))
