"""RetinaNet for backbones that begin at stride 16; AdamW 1e-4, decay 0.05, fixed batch norms.

As in the configs published with EfficientViT, https://arxiv.org/abs/2305.07027, and SHViT,
https://arxiv.org/abs/2401.16456: the pyramid goes on to stride 8 by transposed convolution, and
weight decay spares the attention biases alone.
"""

_base_ = ["./retinanet.py"]

model = dict(
    backbone=dict(norm_eval=True),
    neck=dict(_delete_=True, type="TransposedFPN", num_transposed=1),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(attention_biases=dict(decay_mult=0.0))),
)
