"""Faster layers for inference on the CPU with the same parameters and outputs.

Linear layers, convolutions and norms are made from recorded operators (:mod:`ops.rewriting`).
Inference forms are subclasses of the layer that they replace; :func:`ops.inference.layers.convert`
converts it in place, so that names, parameters and state dict are unchanged. Packed weights for
oneDNN or our kernels are derived from the parameters at the first call. Where the fast path does
not apply (another device or dtype, gradients, autocast, ``torch.compile`` and ``torch.export``,
torch without oneDNN), a layer runs its plain form.
"""

from __future__ import annotations
