"""UPerNet 160k on ADE20K with InceptionNeXt-Base: mIoU 50.6 (table 6 of the paper).
Yu et al., "InceptionNeXt", https://arxiv.org/abs/2303.16900."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="inception_next_base",
        drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="inception_next_base.sail_in1k"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
