"""UPerNet 160k on ADE20K with DiNAT-Tiny: mIoU 47.8 (its code's README).
Hassani and Shi, "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/upernet_nat.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="dinat_tiny",
        dilations="ade20k",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_tiny.in1k"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
