"""Semantic FPN 40k on ADE20K with InceptionNeXt-Small: mIoU 45.6 (table 7 of the paper).
Yu et al., "InceptionNeXt", https://arxiv.org/abs/2303.16900."""

_base_ = ["../_base_/fpn.py", "../_base_/ade20k.py", "../_base_/schedule_40k.py"]
model = dict(
    backbone=dict(
        name="inception_next_small",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="inception_next_small.sail_in1k"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
