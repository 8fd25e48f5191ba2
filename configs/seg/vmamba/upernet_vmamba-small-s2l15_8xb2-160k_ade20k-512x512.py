"""UPerNet 160k on ADE20K with VMamba-S[s2l15]: mIoU 50.6 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="vmamba_small_s2l15",
        drop_path_rate=0.3,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vmamba_small_s2l15.in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
