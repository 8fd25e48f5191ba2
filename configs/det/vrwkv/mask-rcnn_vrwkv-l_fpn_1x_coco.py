"""Mask R-CNN 1x on COCO with VRWKV-L: box AP 50.6, mask AP 44.9 (its code's README).
Duan et al., "Vision-RWKV", https://arxiv.org/abs/2403.02308."""

_base_ = ["../_base_/mask_rcnn_vrwkv.py", "../_base_/coco_mask_1x.py"]
_22k = "https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_l_in22k_192.pth"
model = dict(
    backbone=dict(
        name="vrwkv_l",
        drop_path_rate=0.4,
        adapter=dict(num_heads=16, value_ratio=0.5),
        init_cfg=dict(type="Pretrained", checkpoint=_22k),
    ),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]),
)
