"""UPerNet whose learning rates shrink towards the stem; AdamW 1e-4, decay 0.05.

As in the configs published with UniRepLKNet, https://arxiv.org/abs/2311.15599; leaf files set
``decay_rate``.
"""

_base_ = ["./upernet.py"]

model = dict(backbone=dict(out_norms=True))
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(_delete_=True, decay_rate=1.0),
)
