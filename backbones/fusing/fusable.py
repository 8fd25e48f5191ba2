"""``fuse()``, which prepares a backbone for inference, and the limits of fused backbones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from backbones.fusing.fuse import fuse_network, require_evaluation
from backbones.fusing.int8_state import Int8Model

__all__ = ["FusableBackbone"]

Model = TypeVar("Model", bound="FusableBackbone")


class FusableBackbone(Int8Model, nn.Module):
    """A network of ``stages`` with :meth:`fuse`."""

    stages: nn.Sequential

    def fuse(
        self: Model,
        dtype: torch.dtype | None = None,
        channels_last: bool | Literal["auto"] = "auto",
        *,
        calibrate: Iterable[Any] | Tensor | None = None,
        max_drop: float | None = None,
    ) -> Model:
        """Optimise the model for inference: fold layers, then choose memory format and kernels.

        Norms, branches and scales are folded into adjacent layers. Then, on a CPU with oneDNN, the
        attention and scans get their inference forms (:mod:`ops.inference`).
        Names and state dict are those of the folded model; outputs are equal up to rounding. The
        model supports gradients with respect to images, but not to parameters. ``torch.compile``
        and ``torch.export`` see the plain form of the folded model. For each input layout, the
        first call is recorded and rewritten (:mod:`ops.rewriting`), the second captured, and later
        ones are replayed without Python between the kernels until the model changes
        (:mod:`ops.rewriting.module`). Outside of replays, malloc keeps up to
        256 MiB of freed memory for the next maps (:mod:`ops.inference.heap`).

        Changes are detected if weights and buffers are modified by torch functions, get other
        memory (``p.data = …``, ``vector_to_parameters``) or are replaced, and if layers or hooks
        change. While modules inside have hooks, all layers run as torch computes them. Writes that
        torch cannot see, such as through NumPy or in place through ``.data``, take effect after the
        next call of ``fuse()``.

        Modifies the model in place, puts it in eval mode and returns it; a second call with the
        same ``dtype`` has no effect. Afterwards ``train()`` raises.

        With ``torch.int8``, linear layers and pointwise convolutions compute in int8: weights have
        a scale for each output, inputs one for each row, or fixed ones of a calibration.
        Everything else, and layers whose blocks have a kernel of their own, computes as before.
        Parameters, maps and images are in bfloat16 where the CPU multiplies it, else in float32;
        :attr:`precision` says which, and lists the layers. Where int8 is not faster (no
        AVX512-VNNI, AVX-VNNI, AMX or SDOT), the model stays in float32 and a warning says so, once.

        Args:
            dtype: convert the parameters after folding, for example to ``torch.bfloat16``; images
                must then have that dtype. On CPUs with bfloat16 arithmetic (AMX, AVX512-BF16) this
                takes about half the time of float32, on others the same. Filters keep their
                sums (:mod:`ops.rounding`). ``torch.int8``: see above. Default: unchanged.
            channels_last: False: only fold. True: use the channels-last format on any device.
                ``"auto"``: use it where it was measured to be faster, which is on the CPU.
            calibrate: for ``torch.int8``: batches of preprocessed images (or tuples that begin with
                one), from which inputs get fixed ranges; each is run a few times. Default: ranges
                of each row.
            max_drop: for ``torch.int8``: the largest relative error of the output,
                ‖int8 − float‖ / ‖float‖, on the images of ``calibrate`` or on random ones. The most
                sensitive layers stay in floats, which takes a run for each layer to find out.
                Default: all layers in int8.

        Raises:
            ValueError: ``dtype`` is not floating-point or int8, another argument is invalid, or
                ``calibrate`` or ``max_drop`` are given for another dtype.
            TypeError: ``dtype`` is not a torch.dtype, for example a string.
        """
        fuse_network(self, dtype, channels_last, calibrate, max_drop, is_backbone=True)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Like ``nn.Module.load_state_dict``, but rejects weights from before :meth:`fuse`."""
        if self.fused and strict and (foreign := state_dict.keys() - self.state_dict().keys()):
            raise RuntimeError(
                f"{type(self).__name__} has been fused and needs weights that were saved after "
                f"fuse(), not {min(foreign)} and {len(foreign) - 1} other tensors: load weights "
                "from before fuse() into a new model, then fuse it"
            )
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def fused(self) -> bool:
        """Whether :meth:`fuse` (or timm's ``reparameterize_model``) has been called."""
        return any(stage.fused for stage in self.stages)

    def train(self: Model, mode: bool = True) -> Model:
        """Like ``nn.Module.train``; raises for a fused model, whose norms are folded."""
        require_evaluation(self, mode and self.fused)
        return super().train(mode)
