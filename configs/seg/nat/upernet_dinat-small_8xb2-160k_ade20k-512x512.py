"""UPerNet 160k on ADE20K with DiNAT-Small: mIoU 48.9 (its code's README).
Hassani and Shi, "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/upernet_nat.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="dinat_small",
        dilations="ade20k",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_small.in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
