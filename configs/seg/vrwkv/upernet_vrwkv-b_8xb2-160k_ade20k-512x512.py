"""UPerNet 160k on ADE20K with VRWKV-B: mIoU 49.2 (its code's README).
Duan et al., "Vision-RWKV", https://arxiv.org/abs/2403.02308."""

_base_ = ["../_base_/upernet_vrwkv.py", "../_base_/ade20k_x32.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="vrwkv_b",
        drop_path_rate=0.3,
        adapter=dict(num_heads=12, value_ratio=0.5),
        init_cfg=dict(type="Pretrained", checkpoint="vrwkv_b.in1k"),
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
