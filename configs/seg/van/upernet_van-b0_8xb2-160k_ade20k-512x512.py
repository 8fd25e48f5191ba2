"""UPerNet 160k on ADE20K with VAN-B0: mIoU 41.1, multi-scale (its code's README).
Guo et al., "Visual Attention Network", https://arxiv.org/abs/2202.09741."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="van_b0",
        drop_path_rate=0.1,
        norm_eps=1e-5,
        init_cfg=dict(type="Pretrained", checkpoint="van_b0.in1k"),
    ),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
    auxiliary_head=dict(in_channels=160),
)
