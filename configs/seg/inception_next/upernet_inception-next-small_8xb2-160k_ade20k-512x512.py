"""UPerNet 160k on ADE20K with InceptionNeXt-Small: mIoU 50.0 (table 6 of the paper).
Yu et al., "InceptionNeXt", https://arxiv.org/abs/2303.16900."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="inception_next_small",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="inception_next_small.sail_in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
