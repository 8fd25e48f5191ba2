"""UPerNet 160k on ADE20K with BiFormer-Base: mIoU 51.0 (its code's README).
Zhu et al., "BiFormer", https://arxiv.org/abs/2303.08810."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="biformer_base",
        drop_path_rate=0.4,
        n_win=8,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="biformer_base.in1k"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
