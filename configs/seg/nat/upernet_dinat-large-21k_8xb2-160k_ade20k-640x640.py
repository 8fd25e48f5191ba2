"""UPerNet 160k on ADE20K with DiNAT-Large from ImageNet-22k: mIoU 54.0 (its code's README).
Hassani and Shi, "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001."""

_base_ = ["../_base_/upernet_nat_640.py", "../_base_/ade20k_640.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="dinat_large_21k",
        dilations="ade20k-640",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_large_21k.in22k"),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
