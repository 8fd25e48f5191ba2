"""Mask R-CNN on Vision-RWKV with a ViT-Adapter; learning rates shrink towards the stem.

As in the configs published with Vision-RWKV, https://arxiv.org/abs/2403.02308, with one difference:
they count the norm after the stem to the first block, not to the stem. ``segments`` is that of the
kernel in their folder of detectors. Chen et al., "Vision Transformer Adapter for Dense
Predictions", https://arxiv.org/abs/2205.08534.
"""

_base_ = ["./mask_rcnn.py"]

model = dict(backbone=dict(segments=32, adapter=dict(num_heads=6)))
optim_wrapper = dict(
    constructor="LayerDecayConstructor", paramwise_cfg=dict(_delete_=True, decay_rate=0.85)
)
