"""VMamba: a pyramid that mixes pixels by selective scans of the map in four orders.

Yue Liu et al., "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166.
``vanilla_vmamba_*`` are the first version, with 16 states a channel; ``vmamba_*`` have one.

Accepts any input size from 32×32. The stage at stride s has ⌈H/s⌉ rows; ``vanilla_vmamba_*`` drop
an incomplete patch of 4×4 at the right and bottom, and zero-pad odd maps before they merge squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, Mlp
from torch import Tensor, nn

from backbones.common.checks import whole
from backbones.core.base import StagedBackbone
from backbones.core.keywords import check_widths, checked, widths
from backbones.core.published import VMAMBA_NAMES, imagenet_cfg, renamed
from backbones.core.registry import register_variants, variant
from backbones.core.stage import TokenStage, layer_norm, make_stages
from ops.init import init_linear
from ops.patch import ConvLayerNorm, PatchMerging
from ops.selective_scan import cross_selective_scan

__all__ = ["VMamba"]

_STEPS = (1e-3, 1e-1)  # initial range of the scan's steps


class SelectiveScan2d(nn.Module):
    """A convolution, then selective scans of its map in four orders, which are summed.

    (B, H, W, dim) → (B, H, W, dim). See :func:`ops.selective_scan.cross_selective_scan`.

    ``hidden_dim`` channels of ``num_states`` are scanned. If ``gated``, the normalised sum is
    multiplied by a second projection of the input.
    """

    def __init__(self, dim: int, hidden_dim: int, num_states: int, gated: bool = False) -> None:
        super().__init__()
        rank, channels = -(-dim // 16), 4 * hidden_dim
        self.gated = gated
        self.in_proj = nn.Linear(dim, 2 * hidden_dim if gated else hidden_dim, bias=False)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, bias=gated)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(hidden_dim, 4 * (rank + 2 * num_states), bias=False)
        self.delta_weight = nn.Parameter(torch.empty(4, rank, hidden_dim))  # as kernels read it
        self.delta_bias = nn.Parameter(torch.empty(4, hidden_dim))
        self.A_log = nn.Parameter(torch.empty(channels, num_states))
        self.D = nn.Parameter(torch.empty(channels))
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-5)
        self.proj = nn.Linear(hidden_dim, dim, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Decays of 1 to ``num_states`` for a step of 1, and steps from 0.001 to 0.1."""
        for weight in (self.x_proj.weight, self.delta_weight.mT):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        self.delta_bias.uniform_(*map(math.log, _STEPS)).exp_()
        self.delta_bias.add_((-(-self.delta_bias).expm1()).log())  # softplus inverted
        self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1).log())
        nn.init.ones_(self.D)

    def decays(self) -> Tensor:
        """A of the scan, in float32 or more: (4 · hidden_dim, num_states)."""
        held: Tensor = self.A_log if hasattr(self, "A_log") else self.A
        held = held.to(torch.promote_types(held.dtype, torch.float32))
        return -held.exp() if hasattr(self, "A_log") else held

    @torch.no_grad()
    def fuse(self) -> SelectiveScan2d:
        """Replace ``A_log`` by ``A``, in place."""
        if hasattr(self, "A_log"):
            self.A = nn.Parameter(self.decays())
            del self.A_log
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        gate = None
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
        x = self.act(self.dwconv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        x = cross_selective_scan(
            x,
            self.x_proj(x),
            self.delta_weight.mT,
            self.decays(),
            self.D,
            delta_bias=self.delta_bias.flatten(),
            delta_softplus=True,
        )
        x = self.norm(x)
        return self.proj(x if gate is None else x * F.silu(gate))


class Block(nn.Module):
    """Pre-norm residual scan and, with ``mlp_ratio``, MLP: (B, H, W, dim) → (B, H, W, dim)."""

    def __init__(
        self, dim: int, mixer: SelectiveScan2d, mlp_ratio: float = 4, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = mixer
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(dim, eps=1e-5)
            self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x))) if hasattr(self, "mlp") else x


class VMamba(StagedBackbone):
    """VMamba.

    Args:
        scan_ratio: channels that are scanned relative to ``dims``.
        num_states: states of each of these channels.
        vanilla: the first version: gated scans without MLPs, and patches of 4×4 and merged squares
            instead of strided convolutions.
    """

    first_conv = "stem.0.conv"

    @checked("dims", dims=widths(2), num_states=whole(1, 256))
    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 8, 2),
        scan_ratio: float = 1,
        num_states: int = 1,
        mlp_ratio: float = 4,
        *,
        vanilla: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: bool | Sequence[int] = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        check_widths("scan_ratio", dims, scan_ratio)
        half = dims[0] // 2
        if vanilla:
            self.stem = nn.Sequential(ConvLayerNorm(in_chans, dims[0], 4, 4, padding=0))
        else:
            self.stem = nn.Sequential(
                ConvLayerNorm(in_chans, half), nn.GELU(), ConvLayerNorm(half, dims[0])
            )

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            hidden_dim = int(dims[i] * scan_ratio)
            mixer = SelectiveScan2d(dims[i], hidden_dim, num_states, gated=vanilla)
            return Block(dims[i], mixer, 0 if vanilla else mlp_ratio, drop_path)

        downsample = PatchMerging if vanilla else ConvLayerNorm
        self.stages = make_stages(
            depths, drop_path_rate, block, lambda i: downsample(dims[i - 1], dims[i]), TokenStage
        )
        self.norm = layer_norm(dims[-1])
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate)
        self.describe_features(dims, out_norms=out_norms, out_norm_layer=layer_norm)
        self.apply(_init_weights)

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts the names of the original's classifiers, old and new, and of its backbones.

        Matrices may be 1×1 convolutions, and those of the four orders one matrix.
        """
        own = self.state_dict()
        converted = {}
        for key, tensor in state_dict.items():
            name = renamed(key, _RENAMES)
            wanted = own.get(name, tensor)
            if ".dt_projs" in key and name.endswith(".delta_weight"):
                tensor = tensor.reshape(4, wanted.shape[-1], -1).mT
            elif wanted.ndim != tensor.ndim and wanted.numel() == tensor.numel():
                tensor = tensor.reshape(wanted.shape)
            converted[name] = tensor
        return converted


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, SelectiveScan2d):
        module.init_weights()


_RENAMES = (
    *VMAMBA_NAMES,
    (r"(\.blocks\.\d+)\.(?:ln_1|norm)\.", r"\1.norm1."),
    (r"\.(?:op|self_attention)\.", ".mixer."),
    (r"\.conv2d\.", ".dwconv."),
    (r"\.x_proj_weight$", ".x_proj.weight"),
    (r"\.dt_projs[._]", ".delta_"),
    (r"\.A_logs$", ".A_log"),
    (r"\.Ds$", ".D"),
    (r"\.out_norm\.", ".norm."),
    (r"\.out_proj\.", ".proj."),
)

_cfg = partial(
    imagenet_cfg,
    url="https://github.com/MzeroMiko/VMamba/releases/download/%23{}.pth",
    license="mit",
    origin_url="https://github.com/MzeroMiko/VMamba",
    paper_name="VMamba: Visual State Space Model",
    paper_ids="arXiv:2401.10166",
)

default_cfgs = {
    "vmamba_tiny_s1l8.in1k": _cfg("v2cls/vssm1_tiny_0230s_ckpt_epoch_264"),
    "vmamba_small_s1l20.in1k": _cfg("v2cls/vssm1_small_0229s_ckpt_epoch_240"),
    "vmamba_base_s1l20.in1k": _cfg("v2cls/vssm1_base_0229s_ckpt_epoch_225"),
    "vmamba_tiny_s2l5.in1k": _cfg("v2cls/vssm_tiny_0230_ckpt_epoch_262"),
    "vmamba_small_s2l15.in1k": _cfg("v2cls/vssm_small_0229_ckpt_epoch_222"),
    "vmamba_base_s2l15.in1k": _cfg("v2cls/vssm_base_0229_ckpt_epoch_237"),
    "vanilla_vmamba_tiny.in1k": _cfg("v0cls/vssmtiny_dp01_ckpt_epoch_292"),
    "vanilla_vmamba_small.in1k": _cfg("v0cls/vssmsmall_dp03_ckpt_epoch_238"),
    "vanilla_vmamba_base.in1k": _cfg("v0cls/vssmbase_dp06_ckpt_epoch_241"),
}
_BASE = (128, 256, 512, 1024)
_VANILLA: dict[str, Any] = dict(scan_ratio=2, num_states=16, vanilla=True)

vmamba_tiny_s1l8 = variant(VMamba, drop_path_rate=0.2)
vmamba_small_s1l20 = variant(VMamba, depths=(2, 2, 20, 2), drop_path_rate=0.3)
vmamba_base_s1l20 = variant(VMamba, dims=_BASE, depths=(2, 2, 20, 2), drop_path_rate=0.5)
vmamba_tiny_s2l5 = variant(VMamba, depths=(2, 2, 5, 2), scan_ratio=2, drop_path_rate=0.2)
vmamba_small_s2l15 = variant(VMamba, depths=(2, 2, 15, 2), scan_ratio=2, drop_path_rate=0.3)
vmamba_base_s2l15 = variant(
    VMamba, dims=_BASE, depths=(2, 2, 15, 2), scan_ratio=2, drop_path_rate=0.6
)
vanilla_vmamba_tiny = variant(VMamba, depths=(2, 2, 9, 2), **_VANILLA, drop_path_rate=0.2)
vanilla_vmamba_small = variant(VMamba, depths=(2, 2, 27, 2), **_VANILLA, drop_path_rate=0.3)
vanilla_vmamba_base = variant(
    VMamba, dims=_BASE, depths=(2, 2, 27, 2), **_VANILLA, drop_path_rate=0.6
)

register_variants(__name__)
