"""UPerNet 160k on ADE20K with InceptionNeXt-Tiny: mIoU 47.9 (table 6 of the paper).
Yu et al., "InceptionNeXt", https://arxiv.org/abs/2303.16900."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="inception_next_tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="inception_next_tiny.sail_in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
