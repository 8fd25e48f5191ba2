"""UPerNet 160k on ADE20K with VAN-B6 from ImageNet-22k: mIoU 54.7, multi-scale (paper, table 13).
Guo et al., "Visual Attention Network", https://arxiv.org/abs/2202.09741."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="van_b6",
        drop_path_rate=0.5,
        norm_eps=1e-5,
        init_cfg=dict(type="Pretrained", checkpoint="van_b6.in22k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
