"""UPerNet 160k on ADE20K with VRWKV-T: mIoU 43.3 (its code's README).
Duan et al., "Vision-RWKV", https://arxiv.org/abs/2403.02308."""

_base_ = ["../_base_/upernet_vrwkv.py", "../_base_/ade20k_x32.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="vrwkv_t",
        drop_path_rate=0.1,
        layer_scale=1.0,
        init_cfg=dict(type="Pretrained", checkpoint="vrwkv_t.in1k"),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
optim_wrapper = dict(optimizer=dict(lr=1.2e-4), paramwise_cfg=dict(decay_rate=0.95))
