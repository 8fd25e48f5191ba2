"""UPerNet 160k on ADE20K with RAVLT-B: mIoU 52.5 (its code's README).
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", https://arxiv.org/abs/2411.07635."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/schedule_160k.py"]
model = dict(
    backbone=dict(
        name="ravlt_b", out_norms=True, init_cfg=dict(type="Pretrained", checkpoint="ravlt_b.in1k")
    ),
    decode_head=dict(in_channels=[96, 192, 384, 512]),
    auxiliary_head=dict(in_channels=384),
)
