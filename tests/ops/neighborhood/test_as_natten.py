"""Programs that import an old NATTEN, with ours in its place."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones.nat import NAT
from ops.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    as_natten,
    correct_dinat,
    install_as_natten,
    na2d,
    na2d_qk,
    natten,
)

OURS = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no NATTEN were installed."""
    for name in [n for n in sys.modules if n == "natten" or n.startswith("natten.")]:
        monkeypatch.delitem(sys.modules, name)
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        is_absent = name == "natten" and name not in sys.modules
        return None if is_absent else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_completes_an_installed_natten() -> None:
    theirs = importlib.import_module("natten")
    attention = theirs.functional.na2d
    with install_as_natten():
        from natten.functional import na2d_av, natten2dqkrpb

        assert na2d_av.__module__ == natten2dqkrpb.__module__ == "ops.neighborhood.split"
        assert theirs.functional.na2d is attention, "what it has stays"
        assert natten._import_natten() is theirs, "it is still a backend"
        theirs.use_fused_na(True)
    assert not hasattr(theirs.functional, "na2d_av")
    assert not hasattr(theirs, "use_fused_na")


@pytest.mark.usefixtures("absent")
def test_stands_in_for_an_absent_natten() -> None:
    from transformers.utils import is_natten_available

    finders = list(sys.meta_path)
    with install_as_natten():
        import natten as stand_in
        from natten.context import is_fna_enabled
        from natten.functional import na2d_qk as theirs

        assert theirs is na2d_qk
        assert not is_fna_enabled()
        assert stand_in.__version__ == importlib.metadata.version("natten") == "0.17.5"
        assert is_natten_available()
        assert importlib.util.find_spec("natten").origin == "ops.neighborhood.as_natten"
        natten._import_natten.cache_clear()
        assert natten._import_natten() is None, "it is no backend of itself"
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("natten.flops")
    natten._import_natten.cache_clear()
    assert sys.meta_path == finders and not is_natten_available()
    assert "natten" not in sys.modules
    assert importlib.metadata.version("natten") != "0.17.5"


@pytest.mark.usefixtures("absent")
def test_installs_once_and_uninstalls_twice() -> None:
    installed = install_as_natten()
    again = install_as_natten()
    again.uninstall()
    assert "natten" in sys.modules
    installed.uninstall()
    installed.uninstall()
    assert "natten" not in sys.modules


def test_refuses_an_unknown_version() -> None:
    with pytest.raises(ValueError, match=r"0\.14, 0\.17, got '0\.15'"):
        install_as_natten("0.15")


@pytest.fixture(params=["0.14", "0.17"])
def stand_in(request: pytest.FixtureRequest, absent: None) -> Iterator[ModuleType]:
    with install_as_natten(request.param):
        yield importlib.import_module("natten")


def test_settings_are_accepted(stand_in: ModuleType) -> None:
    for name in as_natten.IGNORED:
        assert getattr(stand_in, name)(True) is None
    for name in as_natten.ASKED:
        assert getattr(stand_in, name)() is False
    assert stand_in.has_half()
    assert stand_in.has_cuda() == torch.cuda.is_available()
    assert stand_in.get_memory_usage_preference() == "default"


def test_functions(stand_in: ModuleType) -> None:
    query = torch.randn(1, 9, 9, 2, 8)  # of the fused one, which has no stride; 0 is no scale
    out = stand_in.functional.na2d(query, query, query, 3, 2, scale=0, xformers_kwargs={})
    assert torch.equal(out, na2d(query, query, query, 3, dilation=2))
    query, bias, more = torch.randn(1, 2, 9, 9, 8), torch.randn(2, 5, 5), torch.randn(1, 2, 3, 8)
    got = stand_in.functional.na2d_qk_with_bias(query, query, bias, 3, 2, more)
    assert torch.equal(got, na2d_qk(query, query, 3, 2, more, rpb=bias))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers(stand_in: ModuleType, rank: int) -> None:
    is_old = stand_in.__version__ == "0.14.6"
    arguments = (8, 2, 3, 2, True) if is_old else (8, 2, 3, 2, False, True)
    layer = getattr(stand_in, f"NeighborhoodAttention{rank}D")(*arguments)
    assert layer.small_maps == ("pad" if is_old else "refuse")
    ours = OURS[rank - 1](8, 2, 3, dilation=2, rel_pos_bias=True)
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, *(7, 8, 6)[:rank], 8)
    assert isinstance(layer, OURS[rank - 1]) and torch.equal(layer(x), ours(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dropout_of_weights(stand_in: ModuleType, rank: int) -> None:
    layer = getattr(stand_in, f"NeighborhoodAttention{rank}D")(8, 2, 3, attn_drop=0.5)
    x = torch.randn(2, *(5, 6, 4)[:rank], 8)
    without = layer.eval()(x)
    torch.manual_seed(0)
    dropped = layer.train()(x)
    assert not torch.allclose(dropped, without)
    # Dropped weights are zero, the others doubled: the mean over many calls is the whole.
    mean = torch.stack([layer(x) for _ in range(200)]).mean(0)
    assert (mean - without).abs().max() < 0.2 * (dropped - without).abs().max()
    layer.attn_drop = 1.0
    torch.testing.assert_close(layer(x), layer.proj.bias.expand_as(without))


# ---- transformers ------------------------------------------------------------------------------
CONFIG: dict[str, Any] = {
    **{"embed_dim": 16, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 4, 8], "kernel_size": 3},
    **{"mlp_ratio": 3.0, "layer_scale_init_value": 0.5},
}
DILATIONS = {"nat": [[1], [1, 1], [1, 1], [1]], "dinat": [[2], [1, 2], [1, 2], [1]]}


@pytest.fixture(scope="module")
def transformers() -> Iterator[ModuleType]:
    with install_as_natten():
        library = importlib.import_module("transformers")
        correct_dinat()
        yield library


def ours_of(theirs: nn.Module, dilations: list[list[int]], **options: Any) -> NAT:
    """Our network with the weights of a transformers backbone, which are all moved from zero."""
    generator = torch.Generator().manual_seed(0)
    for tensor in theirs.parameters():
        with torch.no_grad():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    ours = NAT(
        dims=(16, 32, 64, 128),
        depths=CONFIG["depths"],
        num_heads=CONFIG["num_heads"],
        kernel_size=3,
        dilations=dilations,
        layer_scale=0.5,
        num_classes=0,
        **options,
    )
    missing, unexpected = ours.load_state_dict(
        ours.convert_state_dict(dict(theirs.state_dict())), strict=False
    )
    assert not missing and not unexpected
    return ours.eval()


def assert_same(ours: list[Tensor], theirs: list[Tensor], x: Tensor) -> None:
    """The same maps and gradients of the image, within 1e-5 of the largest."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(b.shape, generator=generator) for b in theirs]
    (mine,) = torch.autograd.grad(ours, x, weights)
    (other,) = torch.autograd.grad(theirs, x, weights)
    assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


# The last map of the second is smaller than a window: both pad.
@pytest.mark.parametrize("size", [(96, 128), (64, 52)])
@pytest.mark.parametrize("kind", DILATIONS)
def test_dinat_of_transformers(transformers: ModuleType, kind: str, size: tuple[int, int]) -> None:
    config = transformers.DinatConfig(**CONFIG, dilations=DILATIONS[kind])
    model = transformers.DinatModel(config).eval()
    ours = ours_of(model, DILATIONS[kind])
    x = torch.randn(2, 3, *size, requires_grad=True)
    theirs = model(x).last_hidden_state.movedim(-1, 1)
    assert_same([ours.forward_features(x)], [theirs], x)


def test_attentions_of_transformers(transformers: ModuleType) -> None:
    """Each query's weights, which only the split form has."""
    config = transformers.DinatConfig(**CONFIG, dilations=DILATIONS["nat"])
    model = transformers.DinatModel(config).eval()
    attentions = model(torch.randn(1, 3, 64, 96), output_attentions=True).attentions
    assert attentions[0].shape == (1, 1, 16, 24, 9)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(1, 1, 16, 24))


def test_backbone_of_oneformer(transformers: ModuleType) -> None:
    from transformers.models.oneformer.modeling_oneformer import OneFormerPixelLevelModule

    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.DinatConfig(**CONFIG, dilations=DILATIONS["dinat"], out_features=stages)
    whole = transformers.OneFormerConfig(backbone_config=config)
    encoder = OneFormerPixelLevelModule(whole).encoder.eval()
    assert type(encoder) is transformers.DinatBackbone
    ours = ours_of(encoder, DILATIONS["dinat"], out_norms=True)
    x = torch.randn(1, 3, 96, 64, requires_grad=True)
    mine = ours.forward_intermediates(x, intermediates_only=True)
    assert_same(mine, list(encoder(x).feature_maps), x)
