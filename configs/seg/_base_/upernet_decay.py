"""UPerNet whose learning rates shrink towards the stem; leaf files set ``decay_rate``."""

_base_ = ["./upernet.py"]

optim_wrapper = dict(
    constructor="LayerDecayConstructor", paramwise_cfg=dict(_delete_=True, decay_rate=1.0)
)
