"""Layers for inference on the CPU: the same parameters and functions as the plain ones, faster.

Each is a subclass of the layer that it stands for. :func:`ops.inference.layers.convert` turns a
layer into one in place, so that names, parameters and state dict stay as they were; weights in the
order that oneDNN or our kernels want are derived from the parameters at the first call. Wherever
the fast way does not apply (another device or dtype, gradients, autocast, ``torch.compile`` and
``torch.export``, a torch without oneDNN) a layer computes what its plain form does.
"""

from __future__ import annotations
