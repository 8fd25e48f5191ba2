"""UPerNet 160k on ADE20K with VRWKV-L: mIoU 53.5 (its code's README).
Duan et al., "Vision-RWKV", https://arxiv.org/abs/2403.02308."""

_base_ = ["../_base_/upernet_vrwkv.py", "../_base_/ade20k_x32.py", "../_base_/schedule_160k.py"]
_22k = "https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_l_in22k_192.pth"
model = dict(
    backbone=dict(
        name="vrwkv_l",
        drop_path_rate=0.4,
        adapter=dict(num_heads=16, value_ratio=0.5),
        init_cfg=dict(type="Pretrained", checkpoint=_22k),
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9))
