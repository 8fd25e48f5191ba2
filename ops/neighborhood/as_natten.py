"""Our functions under NATTEN's names, for programs that import an old ``natten``.

Releases from 0.20 on dropped the split functions, the relative position bias and the kernels for
CPUs and ROCm (https://github.com/SHI-Labs/NATTEN). The names here are those of 0.17, with the
functions of 0.14.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.neighborhood import functional, split
from ops.neighborhood.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    _NeighborhoodAttention,
)

__all__ = ["correct_dinat", "install_as_natten"]

VERSIONS = {"0.14": "0.14.6", "0.17": "0.17.5"}

# Settings of NATTEN's kernels, which ours don't have: accepted and ignored.
IGNORED = (
    "disable_autotuner",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "set_memory_usage_preference",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
)
# What asks for such a setting, or for a kernel that uses it: False.
ASKED = (
    "are_deterministic_algorithms_enabled",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
)


class install_as_natten:  # noqa: N801 (a function that is a context manager, too)
    """Let ``import natten`` find the functions and layers of :mod:`ops.neighborhood`.

    Without NATTEN, the whole package is ours. With an installed NATTEN of another version, only the
    names that it lacks are. Call it before the first import of a program that uses NATTEN::

        from ops.neighborhood import install_as_natten

        install_as_natten()
        from transformers import DinatModel

    ``install_as_natten().uninstall()`` undoes it, as does the end of ``with install_as_natten():``.
    What has been imported from ``natten`` until then remains with its importer.

    Settings of NATTEN's kernels (:data:`ops.neighborhood.as_natten.IGNORED`, ``xformers_kwargs`` of
    the fused functions, ``use_experimental_ops`` of the layers) are accepted and ignored.
    Nested tensors and forward-mode gradients are refused, and there is no ``natten.flops``.

    Args:
        version: whose layers ``natten`` has if it is ours: "0.17" (also those of 0.18 and 0.19), or
            "0.14", which have a position bias by default and pad small maps.

    Raises:
        ValueError: an unknown ``version``.
    """

    def __init__(self, version: str = "0.17") -> None:
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
        self._undo: list[Callable[[], object]] = []
        if hasattr(sys.modules.get("natten"), _MARK):
            return  # installed already
        if importlib.util.find_spec("natten") is not None:
            self._complete(version)
        else:
            self._stand_in(version)
        _ask_transformers_again()

    def uninstall(self) -> None:
        """Undo the installation; does nothing the second time."""
        while self._undo:
            self._undo.pop()()
        _ask_transformers_again()

    def __enter__(self) -> install_as_natten:
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()

    def _complete(self, version: str) -> None:
        """Add the names that the installed NATTEN lacks."""
        for name, contents in _contents(version).items():
            module = importlib.import_module(name)
            for key, value in contents.items():
                if not hasattr(module, key):
                    setattr(module, key, value)
                    self._undo.append(functools.partial(delattr, module, key))

    def _stand_in(self, version: str) -> None:
        """Make the modules, and show them among the installed distributions."""
        finder = _Finder(VERSIONS[version])
        sys.meta_path.insert(0, finder)
        self._undo.append(lambda: sys.meta_path.remove(finder))
        for name, contents in _contents(version).items():
            module = sys.modules[name] = ModuleType(name)
            self._undo.append(functools.partial(sys.modules.pop, name, None))
            module.__spec__ = ModuleSpec(name, None, origin=__name__, is_package=name == "natten")
            vars(module).update({**contents, _MARK: True})
            if name == "natten":
                vars(module).update(__version__=VERSIONS[version], __path__=[])
            else:
                setattr(sys.modules["natten"], name.rpartition(".")[2], module)


def correct_dinat() -> None:
    """Let transformers' DiNAT move its heads to the front; call it before its first forward pass.

    Releases 4.57 to 5.24 swap height and width instead, and fail with any NATTEN. Does nothing
    where the class is right.

    Raises:
        ImportError: transformers is not installed or has no DiNAT.
    """
    from transformers.models.dinat import modeling_dinat

    attention: Any = modeling_dinat.NeighborhoodAttention
    config = SimpleNamespace(qkv_bias=True, attention_probs_dropout_prob=0.0)
    layer = attention(config, 4, 2, 3, 1).eval()
    x = torch.randn(1, 3, 5, 4)
    with torch.no_grad():
        try:
            right = torch.allclose(layer(x)[0], _dinat_forward(layer, x)[0], atol=1e-5)
        except (RuntimeError, ValueError):
            right = False
    if not right:
        attention.forward = _dinat_forward


def _dinat_forward(
    self: Any, hidden_states: Tensor, output_attentions: bool | None = False
) -> tuple[Tensor, ...]:
    """(B, H, W, C) → (B, H, W, C) and, if wanted, the weights (B, heads, H, W, K)."""

    def heads_first(projection: Callable[[Tensor], Tensor]) -> Tensor:
        by_head = projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1))
        return by_head.movedim(-2, 1)

    query = heads_first(self.query) / self.attention_head_size**0.5
    window = (self.kernel_size, self.dilation)
    scores = split.natten2dqkrpb(query, heads_first(self.key), self.rpb, *window)
    weights = self.dropout(scores.softmax(-1))
    out = split.natten2dav(weights, heads_first(self.value), *window).movedim(1, -2).flatten(-2)
    return (out, weights) if output_attentions else (out,)


# Marks modules that stand in for NATTEN's.
_MARK = "__stands_in__"


class _Finder(MetaPathFinder):
    """Finds the distribution, but no modules: those have been imported."""

    def __init__(self, version: str) -> None:
        self._version = version

    def find_spec(self, *args: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        if context is None or context.name in (None, "natten"):
            yield _Distribution(self._version)


class _Distribution(importlib.metadata.Distribution):
    """Metadata of our ``natten``: transformers asks for its version."""

    def __init__(self, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: natten\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: {__name__} stands in for natten, which has no files")


def _ask_transformers_again() -> None:
    """Forget whether transformers has found NATTEN, if it is imported."""
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    if utils is None:
        return
    if hasattr(utils.is_natten_available, "cache_clear"):
        utils.is_natten_available.cache_clear()
    if hasattr(utils, "_natten_available"):  # a constant in releases before 5
        utils._natten_available = importlib.util.find_spec("natten") is not None


def _contents(version: str) -> dict[str, dict[str, Any]]:
    """The contents of each module of ``natten``."""
    settings: dict[str, Any] = {
        **dict.fromkeys(IGNORED, _returns(None)),
        **dict.fromkeys(ASKED, _returns(False)),
        **dict.fromkeys(("has_bfloat", "has_half"), _returns(True)),
        "get_memory_usage_preference": _returns("default"),
        "has_cuda": torch.cuda.is_available,
    }
    functions = {name: getattr(split, name) for name in split.__all__}
    functions |= {
        "na1d": _fused(functional.na1d),
        "na1d_qk_with_bias": _with_bias(split.na1d_qk),
        "na2d": _fused(functional.na2d),
        "na2d_qk_with_bias": _with_bias(split.na2d_qk),
        "na3d": _fused(functional.na3d),
    }
    return {
        "natten": {**_layers_of(version), **settings},
        "natten.context": settings,
        "natten.functional": {**functions, **settings},
    }


def _returns(value: Any) -> Callable[..., Any]:
    """A function of any arguments."""
    return lambda *args, **kwargs: value


def _with_bias(qk: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As in NATTEN 0.15."""
    return lambda query, key, bias, *window, **named: qk(query, key, *window, rpb=bias, **named)


def _fused(attention: Callable[..., Any]) -> Callable[..., Tensor]:
    """As in NATTEN 0.17: without strides, and a scale of 0 means the default."""

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] | None = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        out: Tensor = attention(
            query,
            key,
            value,
            kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            rpb=rpb,
            scale=scale or None,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )
        return out

    return fused


# ---- layers ------------------------------------------------------------------------------------
class _WithDropout(_NeighborhoodAttention):
    """Layers with dropout of attention weights, which only the split form has."""

    attn_drop: float

    def attend(self, qkv: Tensor) -> Tensor:
        if not (self.training and self.attn_drop):
            return super().attend(qkv)
        tensors = qkv.unflatten(-1, (3, self.num_heads, -1)).movedim(-2, 1).unbind(dim=-2)
        query, key, value = tensors  # (B, heads, *S, dim)
        kernel_size, _, dilation, rpb = self.window(query.shape[2:-1])
        of_windows: dict[str, Any] = {
            "kernel_size": kernel_size,
            "dilation": dilation,
            "is_causal": self.is_causal,
        }
        qk, av = (getattr(split, f"na{self.rank}d_{part}") for part in ("qk", "av"))
        weights = qk(query * self.scale, key, rpb=rpb, **of_windows).softmax(-1)
        out = av(F.dropout(weights, self.attn_drop), value, **of_windows)
        return out.movedim(1, -2).flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, attn_drop={self.attn_drop}"


class _Of0_14(_WithDropout):  # noqa: N801 (a version)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size,
            dilation=dilation or 1,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            proj_drop=proj_drop,
            rel_pos_bias=bias,
            small_maps="pad",
        )
        self.attn_drop = attn_drop


class _Of0_17(_WithDropout):  # noqa: N801 (a version)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            proj_drop=proj_drop,
            rel_pos_bias=rel_pos_bias,
        )
        self.attn_drop = attn_drop


def _layers_of(version: str) -> dict[str, type[_NeighborhoodAttention]]:
    """The layers of "0.14" or "0.17" by name.

    Those of 0.14 have a relative position bias by default and pad small maps; those of 0.17 have
    none by default, refuse small maps, and take a size for each axis and causal axes.
    """
    signature = {"0.14": _Of0_14, "0.17": _Of0_17}[version]
    ranks = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
    return {of.__name__: type(of.__name__, (signature, of), {}) for of in ranks}
