"""UPerNet 160k on ADE20K with UniRepLKNet-T: mIoU 48.6 (its code's README).
Ding et al., "UniRepLKNet", https://arxiv.org/abs/2311.15599."""

_base_ = ["../_base_/upernet_decay.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="unireplknet_t",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="unireplknet_t.in1k"),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0))
