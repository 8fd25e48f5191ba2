"""UPerNet 160k on ADE20K with Vanilla VMamba-T: mIoU 47.3 (its code's README).
Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="vanilla_vmamba_tiny",
        drop_path_rate=0.1,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="vanilla_vmamba_tiny.in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
