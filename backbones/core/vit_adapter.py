"""ViT-Adapter: a pyramid from a single-resolution network and a parallel convolutional branch.

Zhe Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023,
https://arxiv.org/abs/2205.08534. Convolutions make maps at strides 4 to 32 of the image. Around
each stage of the network, deformable attention passes features from the branch to the network's
tokens (injector) and back (extractor). The branch is the concatenated pixels of the maps at strides
8, 16 and 32, (B, S, dim) with their ``sizes``; the tokens are the pixels of one at stride 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backbones.common.checks import one_of
from backbones.core.isotropic import IsotropicBackbone
from backbones.core.keywords import checked
from backbones.core.published import renamed
from ops.arguments import require_tensor
from ops.attention.deformable import DeformableAttention, pixel_centres
from ops.batch_norm import BatchNorm2d
from ops.init import init_fan_out
from ops.mlp import DWMlp

STRIDES = (4, 8, 16, 32)
Sizes = Sequence[tuple[int, int]]


class SpatialPrior(nn.Module):
    """Convolutions of the image, and projections of their maps at strides 4, 8, 16 and 32.

    (B, in_chans, H, W) → four maps (B, dim, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        widths = (hidden_dim, 2 * hidden_dim, 4 * hidden_dim, 4 * hidden_dim)
        self.stem = nn.Sequential(
            *_conv_norm_act(in_chans, hidden_dim, stride=2),
            *_conv_norm_act(hidden_dim, hidden_dim),
            *_conv_norm_act(hidden_dim, hidden_dim),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.convs = nn.ModuleList(
            nn.Sequential(*_conv_norm_act(widths[i], widths[i + 1], stride=2)) for i in range(3)
        )
        self.projections = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        return [project(m) for project, m in zip(self.projections, maps, strict=True)]


def _conv_norm_act(in_chs: int, out_chs: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False)
    return [conv, BatchNorm2d(out_chs), nn.ReLU(inplace=True)]


class _Attending(nn.Module):
    """Deformable attention of the pixels of some maps to those of others, both normalised."""

    def __init__(self, dim: int, attn: DeformableAttention) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn

    def attend(self, queries: Tensor, own: Sizes, features: Tensor, sizes: Sizes) -> Tensor:
        """(B, N, dim) of maps of sizes ``own`` and (B, S, dim) of ``sizes`` → (B, N, dim)."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        references = pixel_centres(own, queries.device, dtype)
        return self.attn(self.query_norm(queries), references, self.feat_norm(features), sizes)


class Injector(_Attending):
    """Adds features of the branch to the network's tokens, scaled by ``gamma``, initially zero."""

    def __init__(self, dim: int, attn: DeformableAttention) -> None:
        super().__init__(dim, attn)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor, branch: Tensor, sizes: Sizes) -> Tensor:
        """(B, N, dim) tokens and (B, S, dim) of the branch's ``sizes`` → (B, N, dim)."""
        return tokens + self.gamma * self.attend(tokens, sizes[1:2], branch, sizes)


class Extractor(_Attending):
    """Adds features of the network's tokens to the branch, followed by a feed-forward.

    The feed-forward's convolution sees each map of the branch on its own.
    """

    def __init__(
        self, dim: int, attn: DeformableAttention, hidden_dim: int, drop_path: float
    ) -> None:
        super().__init__(dim, attn)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = DWMlp(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, branch: Tensor, tokens: Tensor, sizes: Sizes) -> Tensor:
        """(B, S, dim) of the branch's ``sizes`` and (B, N, dim) tokens → (B, S, dim)."""
        branch = branch + self.attend(branch, sizes, tokens, sizes[1:2])
        hidden = to_maps(self.ffn.fc1(self.ffn_norm(branch)), sizes)
        x = self.ffn.act(to_tokens([self.ffn.dwconv(m) for m in hidden]))
        return branch + self.drop_path(self.ffn.fc2(x))


class Interaction(nn.Module):
    """The layers around a stage of the network: an injector before it, extractors after it."""

    def __init__(self, injector: Injector, extractors: Sequence[Extractor]) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractors[0]
        self.extra_extractors = nn.ModuleList(extractors[1:])


class AdapterLayers(nn.Module):
    """All layers besides the network's; :class:`ViTAdapter` runs them."""

    def __init__(self, prior: SpatialPrior, interactions: Sequence[Interaction], dim: int) -> None:
        super().__init__()
        self.prior = prior
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.interactions = nn.ModuleList(interactions)
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleList(BatchNorm2d(dim) for _ in STRIDES)
        self.apply(init_fan_out)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.init_weights()
        nn.init.normal_(self.level_embed)
        nn.init.normal_(self.up.weight, std=(2 / (4 * self.up.out_channels)) ** 0.5)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]


def to_tokens(maps: Sequence[Tensor], offsets: Tensor | None = None) -> Tensor:
    """Flattened, concatenated pixels (B, S, dim) of the maps, with a vector added to each map."""
    tokens = [m.flatten(2).transpose(1, 2) for m in maps]
    if offsets is not None:
        tokens = [t + offset for t, offset in zip(tokens, offsets, strict=True)]
    return torch.cat(tokens, dim=1)


def to_maps(tokens: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The contiguous maps (B, dim, h, w) that :func:`to_tokens` flattened."""
    parts = tokens.split([height * width for height, width in sizes], dim=1)
    return [
        part.transpose(1, 2).contiguous().unflatten(2, tuple(size))
        for part, size in zip(parts, sizes, strict=True)
    ]


def _plain_network(name: str, network: Any) -> IsotropicBackbone:
    if not isinstance(network, IsotropicBackbone):
        raise TypeError(
            "ViTAdapter needs a single-resolution backbone of this library, not wrapped by "
            f"features_only, got {type(network).__name__}"
        )
    if network.pyramid is not None:
        raise ValueError("ViTAdapter makes its own pyramid; create the network with pyramid=False")
    if network.fused:
        raise ValueError("wrap the network before fuse(), got a fused one")
    if (stride := network.feature_info[0]["reduction"]) != 16:
        raise ValueError(f"ViTAdapter needs a network of stride 16, got {stride}")
    return network


class ViTAdapter(nn.Module):
    """A backbone of four maps around any single-resolution network.

    (B, in_chans, H, W) → four maps (B, dim, ⌈H / stride⌉, ⌈W / stride⌉) of strides 4, 8, 16 and 32,
    for any size from 32×32. Images are zero-padded to a multiple of 32, as detectors do anyway.

    The network is modified: its final norm and classifier are removed, so that every parameter is
    trained. Its weights can be loaded before or after: :func:`backbones.load_checkpoint` takes an
    adapter, too, and files of classifiers (the adapter's own layers then stay untrained) as well as
    files of detectors and segmenters with an adapter. At initialisation, ``gamma`` is zero, and the
    network computes the same as without the adapter.

    This is the form of Vision-RWKV's published detectors and segmenters, where stochastic depth
    applies to every extractor, including the two additional ones after the last stage.

    Args:
        network: a single-resolution backbone of stride 16, such as ``create_model("vrwkv_t")``.
        num_heads: of the deformable attention; published: 6, 6, 12 and 16 for T, S, B and L.
        points: samples of each head on each map.
        value_ratio: channels of the deformable attention's values relative to the network's;
            published: 1 for T and S, 0.5 for B and L.
        ffn_ratio: width of the extractors' feed-forwards relative to the network's.
        stem_dim: channels of the first convolutions.
        drop_path_rate: stochastic depth of the extractors' feed-forwards; published: the network's.
        add_tokens: add the network's tokens, resized, to the returned maps: ``"last"`` adds the
            last stage's to all of them, as in the published detectors; ``"each"`` adds each
            stage's to one map, the first to the finest, as in the published segmenters (of four
            stages); ``"none"`` adds none.

    Attributes:
        feature_info: channels and strides of the maps, as of ``features_only`` models.
    """

    @checked(network=_plain_network, add_tokens=one_of("last", "each", "none"))
    def __init__(
        self,
        network: IsotropicBackbone,
        *,
        num_heads: int = 6,
        points: int = 4,
        value_ratio: float = 1.0,
        ffn_ratio: float = 0.25,
        stem_dim: int = 64,
        drop_path_rate: float = 0.0,
        add_tokens: str = "last",
    ) -> None:
        super().__init__()
        if add_tokens == "each" and len(network.stages) != len(STRIDES):
            raise ValueError(
                f"add_tokens='each' needs a network of four stages, got {len(network.stages)}"
            )
        dim, stages = network.num_features, len(network.stages)

        def attention(levels: int) -> DeformableAttention:
            return DeformableAttention(dim, num_heads, levels, points, value_ratio)

        def extractor() -> Extractor:
            return Extractor(dim, attention(1), max(1, int(dim * ffn_ratio)), drop_path_rate)

        self.network = network
        self.adapter = AdapterLayers(
            SpatialPrior(network.in_chans, stem_dim, dim),
            [
                Interaction(
                    Injector(dim, attention(3)),
                    [extractor() for _ in range(3 if stage == stages - 1 else 1)],
                )
                for stage in range(stages)
            ],
            dim,
        )
        network.norm = nn.Identity()
        network.reset_classifier(0, "")
        network.head = nn.Identity()
        self.add_tokens = add_tokens
        self.grad_checkpointing = False
        self.feature_info = FeatureInfo(
            [
                {"num_chs": dim, "reduction": stride, "module": f"adapter.norms.{i}"}
                for i, stride in enumerate(STRIDES)
            ],
            out_indices=tuple(range(len(STRIDES))),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The four maps, fine to coarse, of images (B, in_chans, H, W)."""
        require_tensor("x", x)
        if x.ndim != 4 or x.shape[1] != self.network.in_chans:
            raise ValueError(
                f"images must be (B, {self.network.in_chans}, H, W), got {tuple(x.shape)}"
            )
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % 32, 0, -height % 32))
        sizes = [(x.shape[2] // stride, x.shape[3] // stride) for stride in STRIDES]
        layers = self.adapter
        finest, *coarser = layers.prior(x)
        branch = to_tokens(coarser, layers.level_embed)

        x = self.network.embed(x)
        outputs = []  # of each stage
        around: Any
        for i, (stage, around) in enumerate(
            zip(self.network.stages, layers.interactions, strict=True)
        ):
            tokens = self._run(around.injector, to_tokens([x]), branch, sizes[1:])
            (x,) = to_maps(tokens, [x.shape[2:]])
            x = stage(self.network.after_embed(x) if i == 0 else x)
            outputs.append(x)
            tokens = to_tokens([x])
            for extractor in (around.extractor, *around.extra_extractors):
                branch = self._run(extractor, branch, tokens, sizes[1:])

        coarser = to_maps(branch, sizes[1:])
        maps = [finest + layers.up(coarser[0]), *coarser]
        if self.add_tokens != "none":
            added = outputs if self.add_tokens == "each" else [x] * len(maps)
            maps = [m + _resized(t, m.shape[2:]) for m, t in zip(maps, added, strict=True)]
        cropped = [
            m[:, :, : -(-height // stride), : -(-width // stride)].contiguous()
            for m, stride in zip(maps, STRIDES, strict=True)
        ]
        return [norm(m) for norm, m in zip(layers.norms, cropped, strict=True)]

    def _run(self, layer: nn.Module, *arguments: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks, injectors and extractors in the backward pass."""
        self.network.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    # -- checkpoints -----------------------------------------------------------------------------

    @property
    def fused(self) -> bool:
        """Whether the network was fused."""
        return self.network.fused

    @property
    def classifier(self) -> tuple[str, ...]:
        """No classifier; for :func:`backbones.load_checkpoint`."""
        return ()

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts the names of published detectors, and of classification checkpoints."""
        adapter, network = {}, {}
        for key, tensor in state_dict.items():
            name = renamed(key, _RENAMES)
            if name.startswith("adapter."):
                adapter[name] = tensor
            else:
                network[name.removeprefix("network.")] = tensor
        converted = self.network.convert_state_dict(network)
        return adapter | {f"network.{name}": tensor for name, tensor in converted.items()}

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Adapts the network's tables, and its first convolution."""
        return self.network.resize_tensor(name.removeprefix("network."), tensor, shape)


_RENAMES = (
    (r"^(level_embed$|interactions\.|up\.)", r"adapter.\1"),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^spm\.stem\.", "adapter.prior.stem."),
    *((rf"^spm\.conv{i + 2}\.", f"adapter.prior.convs.{i}.") for i in range(3)),
    *((rf"^spm\.fc{i + 1}\.", f"adapter.prior.projections.{i}.") for i in range(4)),
    *((rf"^norm{i + 1}\.", f"adapter.norms.{i}.") for i in range(4)),
)


def _resized(tokens: Tensor, size: Sequence[int]) -> Tensor:
    if tokens.shape[2:] == tuple(size):
        return tokens
    return F.interpolate(tokens, size=tuple(size), mode="bilinear", align_corners=False)
