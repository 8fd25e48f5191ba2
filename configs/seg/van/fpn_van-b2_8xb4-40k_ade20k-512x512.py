"""Semantic FPN 40k on ADE20K with VAN-B2: mIoU 46.7 (table 12 of the paper).
Guo et al., "Visual Attention Network", https://arxiv.org/abs/2202.09741."""

_base_ = ["../_base_/fpn.py", "../_base_/ade20k.py", "../_base_/schedule_40k.py"]
model = dict(
    backbone=dict(
        name="van_b2",
        drop_path_rate=0.2,
        norm_eps=1e-5,
        init_cfg=dict(type="Pretrained", checkpoint="van_b2.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
