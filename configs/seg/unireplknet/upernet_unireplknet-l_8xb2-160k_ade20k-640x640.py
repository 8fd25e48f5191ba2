"""UPerNet 160k on ADE20K with UniRepLKNet-L from ImageNet-22k: mIoU 54.5 (its code's README).
Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/upernet_decay_640.py", "../_base_/ade20k_640.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="unireplknet_l",
        drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_l.in22k_ft_in1k_384"),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.85))
