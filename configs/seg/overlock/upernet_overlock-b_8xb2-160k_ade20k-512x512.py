"""UPerNet 160k on ADE20K with OverLoCK-B: mIoU 51.7 (its code's README).
Lou and Yu, "OverLoCK", https://arxiv.org/abs/2502.20087."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k_x32.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="overlock_b",
        out_norms=True,
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="overlock_b.in1k"),
    ),
    decode_head=dict(in_channels=[80, 160, 528, 720]),
    auxiliary_head=dict(in_channels=528),
)
