"""UPerNet as published with NAT and DiNAT: no weight decay of position biases.

Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143.
"""

_base_ = ["./upernet.py"]

model = dict(backbone=dict(out_norms=True))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0))))
