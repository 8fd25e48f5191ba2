"""Cascade Mask R-CNN with learning rates that shrink towards the stem.

Leaf files set ``decay_rate``.
"""

_base_ = ["./cascade_mask_rcnn.py"]

optim_wrapper = dict(
    constructor="LayerDecayConstructor", paramwise_cfg=dict(_delete_=True, decay_rate=1.0)
)
