"""UPerNet 160k on ADE20K with OverLoCK-T: mIoU 50.3 (its code's README).
Lou and Yu, "OverLoCK", https://arxiv.org/abs/2502.20087."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k_x32.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="overlock_t",
        out_norms=True,
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="overlock_t.in1k"),
    ),
    decode_head=dict(in_channels=[64, 128, 384, 640]),
    auxiliary_head=dict(in_channels=384),
)
