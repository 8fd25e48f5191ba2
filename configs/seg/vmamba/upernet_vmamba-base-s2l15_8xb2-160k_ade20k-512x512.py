"""UPerNet 160k on ADE20K with VMamba-B[s2l15]: mIoU 51.0 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="vmamba_base_s2l15",
        drop_path_rate=0.6,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vmamba_base_s2l15.in1k"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
