"""Linear layers and convolutions with packed weights, fused activation and residual add.

Maps are channels-last, so a pointwise convolution is a linear layer on the last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.activations import activation_of
from ops.cpu.call.binding import Kernel, unseen
from ops.cpu.call.dispatch import kernels_apply
from ops.cpu.direct.direct_conv import DirectConv2d, direct_conv2d
from ops.cpu.gemm.convolution import PackedConv2d
from ops.cpu.gemm.linear import packed_linear, packed_linear_energy
from ops.cpu.policy import Decision, observe_decisions
from ops.cpu.stem.packed_stem import NCHWConv2d, packed_stem
from ops.cpu.winograd.winograd import WinogradConv2d, winograd_conv2d
from ops.fuse.guards import TensorSnapshot
from ops.inference.packed_linear import (
    PackedLinear,
    PackedWeight,
    Quantization,
    by_onednn,
)

__all__ = [
    "FORMS",
    "ActivatedLayer",
    "FastConv2d",
    "FastForm",
    "FastLayer",
    "FastLinear",
    "convert",
    "has_onednn",
    "is_quantized",
    "stands_for",
]

Module = TypeVar("Module", bound=nn.Module)
Form = TypeVar("Form", bound=type[nn.Module])

FORMS: dict[type[nn.Module], type[nn.Module]] = {}  # by the class that they stand for

_KEPT = ("_calls", "_derived", "_made_from", "decisions")  # attributes of converted layers


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch provides oneDNN's linear layers and convolutions for ``dtype``.

    On CPUs without bfloat16 arithmetic, these compute in float32 and round the results.
    """
    return dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()


def stands_for(plain: type[nn.Module]) -> Callable[[Form], Form]:
    """Register the decorated class, a subclass of ``plain``, as the inference form of ``plain``.

    Args:
        plain: exact class of the layers to replace; its subclasses are other layers.
    """

    def register(form: Form) -> Form:
        form.stands_for = plain  # type: ignore[attr-defined]
        FORMS[plain] = form
        return form

    return register


def convert(layer: nn.Module, fast: type[Module]) -> Module:
    """Convert ``layer`` in place to an instance of ``fast``, a subclass of its class."""
    layer.__class__ = fast
    assert isinstance(layer, fast)
    for name in _KEPT:  # later, only their values change, which is not seen as a change of a layer
        if hasattr(fast, name):
            vars(layer).setdefault(name, getattr(fast, name))
    return layer


class FastLayer(nn.Module):
    """Base class of inference layers: data derived from tensors, created on demand.

    Derived data are not part of state dicts, copies or pickles, and are created again if the
    tensors have changed (:class:`ops.fuse.guards.TensorSnapshot`).

    Attributes:
        kernels: what the fast path needs: without one of them, there are no derived data.
        decisions: the rules of :mod:`ops.cpu.policy` consulted in creating them.
        is_watched: whether the caller has checked that nothing has changed, as guards do.
    """

    kernels: ClassVar[Sequence[Kernel]] = ()
    _derived: Any = None
    _made_from: TensorSnapshot | None = None
    _derived_for: torch.dtype | None = None
    decisions: Sequence[Decision] = ()
    is_watched: bool = False

    def derived(self, x: Tensor) -> Any:
        """The result of :meth:`derive`, or None if ``x`` requires the plain form."""
        if self.is_watched and self._derived_for is x.dtype:
            return self._derived
        if torch.compiler.is_compiling():
            return None
        if self._derived is None and self._made_from is not None:
            return None  # the plain form is always right
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.modules()):
            return None  # it calls all modules inside
        sources = [*self.parameters(), *self.buffers()]  # the first in the dtype of inputs
        weight = sources[0]
        if x.dtype != weight.dtype or not kernels_apply((x, weight)):
            return None
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return None
        if self._made_from is None or not self._made_from.matches(sources):
            if not has_onednn(x.dtype) or not kernels_apply(sources):
                return None
            decisions: list[Decision] = []
            # On the input's device, whatever the default device is, and seen by no recording.
            decided = observe_decisions(decisions.append)
            with torch.no_grad(), x.device, unseen(), decided:
                made_from = TensorSnapshot(sources)
                missing = any(k.unavailable(x.device, x.dtype) is not None for k in self.kernels)
                self._derived = None if missing else self.derive(x)
            self._made_from, self.decisions = made_from, decisions
            if self.is_watched:
                self._derived_for = x.dtype
        return self._derived

    def derive(self, x: Tensor) -> Any:
        """Derive data from the parameters, with ``x`` as an example input; None for none."""
        return ()

    # These two may also modify inference-mode tensors, or swap tensors' storages.

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._made_from = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._made_from = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_derived", "_made_from", "_derived_for", "decisions"):
            state.pop(name, None)
        return state


class FastForm(FastLayer):
    """An inference form that computes with derived data, and otherwise as its plain class does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        derived = self.derived(args[0])
        return super().forward(*args, **kwargs) if derived is None else self.fast(args[0], derived)

    def fast(self, x: Tensor, derived: Any) -> Any:
        """The result of ``forward`` with the data of :meth:`derive`."""
        raise NotImplementedError


class ActivatedLayer(FastLayer):
    """A layer that applies an activation to its output."""

    activation: str = "none"
    quantization: Quantization | None = None  # of linear layers
    forward: Callable[..., Tensor]

    def _finish(self, x: Tensor) -> Tensor:
        return activation_of(self.activation).plain(x)

    def extra_repr(self) -> str:
        shown = f"{super().extra_repr()}, activation={self.activation}"
        return shown if self.quantization is None else f"{shown}, int8={self.quantization.in_range}"


def is_quantized(*layers: Any) -> bool:
    """Whether any of the layers computes in int8."""
    return any(getattr(layer, "quantization", None) is not None for layer in layers)


class FastLinear(ActivatedLayer, nn.Linear):
    """``activation(linear(x * scale)) + residual * residual_scale``, or times ``factor``.

    (B, …, in_features) → (B, …, out_features); ``scale`` is (B, in_features), ``residual_scale``
    (out_features,) in float32. With :attr:`clips_sum`, ReLU or ReLU6 is applied to the sum.
    """

    clips_sum: bool = False

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        residual_scale: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        packed = self.derived(x)
        own = None
        if packed is not None:
            is_scaled = scale is not None or residual_scale is not None
            given = x, self.activation
            own = packed.packed_for(*given, is_scaled=is_scaled, has_factor=factor is not None)
        if own is not None:
            weight, weight_scale, bias, in_range = own
            if factor is not None:
                combined: tuple[Tensor | None, str] = factor, "multiply"
            elif residual is None:
                combined, residual_scale = (None, "none"), None
            elif self.clips_sum:
                combined = residual, "add_clipped"
            else:
                combined = residual, "add" if residual_scale is None else "add_scaled"
            scales = scale, residual_scale, weight_scale, in_range
            out: Tensor = packed_linear(x, weight, bias, self.activation, *combined, *scales)
            return out
        if scale is not None:
            x = x * scale.view(len(scale), *[1] * (x.ndim - 2), x.shape[-1])
        if residual is not None and residual_scale is not None:
            residual = residual * residual_scale.to(residual.dtype)
        clips = self.clips_sum and residual is not None
        activation = "none" if clips else self.activation
        if packed is not None:
            out = packed.by_onednn(x, activation, residual)
            out = out if factor is None else out.mul_(factor)
        else:
            out = activation_of(activation).plain(super().forward(x))
            out = out if residual is None else out + residual
            out = out if factor is None else out * factor
        return self._finish(out) if clips else out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', clips_sum=True' if self.clips_sum else ''}"

    def energy(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``self(x, scale=scale)`` and the sums of its squares: (B, out_features)."""
        packed = self.derived(x)
        own = None if packed is None else packed.packed_for(x, self.activation, is_scaled=True)
        if own is not None:
            weight, weight_scale, bias, in_range = own
            given = weight, bias, self.activation, scale, weight_scale, in_range
            both: tuple[Tensor, Tensor] = packed_linear_energy(x, *given)
            return both[0], both[1]
        out = self(x, scale=scale)
        return out, (out * out).flatten(1, -2).sum(1)

    def for_int8(self, x: Tensor) -> PackedWeight | None:
        """This layer's int8 weights and scales for the kernel of a whole block, or None."""
        packed = self.derived(x) if self.quantization is not None else None
        return packed.packed() if packed is not None and packed.is_int8 else None

    def derive(self, x: Tensor) -> PackedLinear:
        return PackedLinear(self.weight, self.bias, self.quantization)


class FastConv2d(ActivatedLayer, nn.Conv2d):
    """``activation(conv(x))`` in channels-last, (B, C, H, W) → (B, C', H', W').

    Where convolutions are strided, oneDNN's are limited by memory; there, windows are copied and
    passed to our linear kernel. Images are read in their own layout.
    """

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        if derived is None:
            return self._finish(super().forward(x))
        own, packed = derived
        if own is not None and self.pays(own, x):
            out: Tensor = own(x, self.activation)
            return out
        weight, bias = packed(x.shape)
        out = by_onednn(
            torch.ops.mkldnn._convolution_pointwise.default,
            self.activation,
            x.to(weight.dtype, memory_format=torch.channels_last),
            weight,
            bias,
            *(self.padding, self.stride, self.dilation, self.groups),
        )
        return out.to(x.dtype)

    def pays(self, own: Any, x: Tensor) -> bool:
        """Whether our kernel is faster than oneDNN's."""
        if not isinstance(own, NCHWConv2d):
            return True
        return policy.conv_by_kernel(self.in_channels, x.is_contiguous(), x.dtype)

    def derive(self, x: Tensor) -> tuple[Any, Callable[[torch.Size], Any]]:
        """For our kernel, if there is one, and for oneDNN."""
        return self.for_kernel(x), self.for_onednn(x)

    def for_kernel(self, x: Tensor) -> Callable[[Tensor, str], Any] | None:
        """The convolution by one of our kernels, if one is ever faster."""
        stride: Any = self.stride
        dilation: Any = self.dilation
        if self.quantization is not None and self.quantization.applies(self.weight):
            return PackedConv2d(self, self.quantization.pack)
        groups = self.in_channels // self.groups, self.out_channels // self.groups, self.groups
        for kernel, kind, pays in (
            (winograd_conv2d, WinogradConv2d, policy.winograd_by_kernel),
            (direct_conv2d, DirectConv2d, policy.direct_by_kernel),
        ):
            available = kernel.unavailable(x.device, x.dtype) is None
            if available and kind.applies(self) and pays(*groups, x.dtype):
                return kind(self)
        if not policy.convolves_windows(stride, dilation, self.groups, x.dtype):
            return None
        if policy.copies_windows(self.in_channels, stride, x.dtype):
            reason = packed_linear.unavailable(x.device, x.dtype)
            return PackedConv2d(self) if reason is None else None
        own = NCHWConv2d.applies(self) and packed_stem.unavailable(x.device, x.dtype) is None
        return NCHWConv2d(self) if own else None

    def for_onednn(self, x: Tensor) -> Callable[[torch.Size], Any]:
        """A function that gives the weight in oneDNN's layout for a shape of inputs, and the bias.

        The layout depends on the batch size, if at all. With that for one image, a call for eight
        images may copy the weight to another layout first, element by element: 26 ms before a
        convolution of 1.4 ms in InceptionNeXt-T, in bfloat16.
        """
        dtype = policy.computed_in(x.dtype)
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        bias = None if bias is None else bias.to(dtype)
        geometry = self.padding, self.stride, self.dilation, self.groups
        of_batches: dict[int, Tensor] = {}
        layouts: dict[bytes, Tensor] = {}  # most batches have the same

        @unseen()
        def pack(shape: torch.Size) -> Tensor:
            last = weight.to(dtype, memory_format=torch.channels_last)
            made = torch.ops.mkldnn._reorder_convolution_weight(last, *geometry, shape)
            layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(made).numpy())
            return layouts.setdefault(layout, made)

        def packed(shape: torch.Size) -> tuple[Tensor, Tensor | None]:
            if shape[0] not in of_batches:
                of_batches[shape[0]] = pack(shape)
            return of_batches[shape[0]], bias

        return packed
