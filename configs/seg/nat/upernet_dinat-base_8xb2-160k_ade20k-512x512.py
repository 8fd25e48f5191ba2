"""UPerNet 160k on ADE20K with DiNAT-Base: mIoU 49.6 (its code's README).
Hassani and Shi, "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/upernet_nat.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="dinat_base",
        dilations="ade20k",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_base.in1k"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
