"""UPerNet 160k on ADE20K with UniRepLKNet-XL from ImageNet-22k: mIoU 55.2 (its code's README).
No config of this one was published: drop path and decay are those of L.
Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/upernet_decay_640.py", "../_base_/ade20k_640.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="unireplknet_xl",
        drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_xl.in22k_ft_in1k_384"),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.85))
