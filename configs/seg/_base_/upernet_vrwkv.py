"""UPerNet on Vision-RWKV with a ViT-Adapter; learning rates shrink towards the stem.

As in the configs published with Vision-RWKV, https://arxiv.org/abs/2403.02308, with one difference:
they count the norm after the stem to the first block, not to the stem; leaf files set
``decay_rate``. ``segments`` is that of the kernel in their folder of segmenters when the weights
were published. They train in float16 (``--amp``) and evaluate on crops. Chen et al., "Vision
Transformer Adapter for Dense Predictions", https://arxiv.org/abs/2205.08534.
"""

_base_ = ["./upernet.py"]

model = dict(
    backbone=dict(segments=16, adapter=dict(num_heads=6, add_tokens="each")),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    constructor="LayerDecayConstructor", paramwise_cfg=dict(_delete_=True, decay_rate=1.0)
)
