"""Cascade Mask R-CNN with learning rates that shrink towards the stem; leaf files set the rate.

As in the configs published with UniRepLKNet, https://arxiv.org/abs/2311.15599, with one difference
for UniRepLKNet-T: they count 12 layers there too, of which it has 9, and so slow the layers before
its last stage further, by ``decay_rate`` to the third.
"""

_base_ = ["./cascade_mask_rcnn.py"]

model = dict(backbone=dict(out_norms=True, with_cp=True))
optim_wrapper = dict(
    constructor="LayerDecayConstructor", paramwise_cfg=dict(_delete_=True, decay_rate=1.0)
)
