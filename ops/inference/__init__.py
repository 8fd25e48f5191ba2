"""Inference forms: faster layers for inference on the CPU with the same parameters and outputs.

Each is a subclass of the layer that it replaces. :func:`ops.inference.layers.convert` converts a
layer in place, so that names, parameters and state dict are unchanged; packed weights for oneDNN or
our kernels are derived from the parameters at the first call. Where the fast path does not apply
(another device or dtype, gradients, autocast, ``torch.compile`` and ``torch.export``, torch without
oneDNN), a layer runs its plain form.
"""

from __future__ import annotations
