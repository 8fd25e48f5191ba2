"""The factory and what the base class derives: names, cfgs, norms, pruning, rates."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import timm
import torch
from timm.models import generate_default_cfgs, group_parameters
from zoo import images, outlines, randomise, small

import backbones
from backbones import IsotropicBackbone
from backbones.core import registry
from backbones.core.registry import register, register_variants, variant
from backbones.van import VAN

TIMMS_OWN = [
    *(f"efficientvit_m{i}" for i in range(6)),
    *(f"inception_next_{size}" for size in ("atto", "tiny", "small", "base")),
    *(f"shvit_s{i}" for i in range(1, 5)),
]


def test_lists() -> None:
    assert backbones.list_models("van_b*") == [f"van_b{i}" for i in range(7)]
    assert backbones.list_models(["van_b0", "shvit*"], family="shvit") == [
        f"shvit_s{i}" for i in range(1, 5)
    ]
    assert "van_b0.in1k" in backbones.list_models("van*", pretrained=True)
    assert "van_b5.untrained" not in backbones.list_models(pretrained=True)
    assert {"van", "shvit", "inception_next"} <= set(backbones.list_families())
    with pytest.raises(ValueError, match="unknown family 'vans'.*'van'"):
        backbones.list_models(family="vans")
    with pytest.raises(ValueError, match="unknown family 'qqq'; valid: 'biformer', .*'van'"):
        backbones.list_models(family="qqq")


@pytest.mark.parametrize(
    ("name", "arguments", "error", "said"),
    [
        ("van_b9", {}, ValueError, "unknown model 'van_b9'.*'van_b"),
        ("qqq", {}, ValueError, r"unknown model 'qqq'; (?!.*van_b0).*backbones.list_models\(\)"),
        ("../../etc/passwd", {}, ValueError, r"unknown model '\.\./\.\./etc/passwd'; "),
        ("van_b0.in2k", {}, ValueError, "unknown tag of van_b0 'in2k'.*'in1k'"),
        ("van_b0", {"drop_path": 0.1}, TypeError, "unknown keyword 'drop_path'.*'drop_path_rate'"),
        ("van_b0", {"out_indices": (0, 1)}, TypeError, "features_only=True"),
    ],
)
def test_unknown_names_suggest_the_nearest(
    name: str, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        backbones.create_model(name, **arguments)


def test_tags_and_overlays() -> None:
    with outlines():
        backbone = backbones.create_model("van_b4.in22k")
        assert (backbone.num_classes, backbone.default_cfg["tag"]) == (0, "in22k")
        assert backbones.create_model("van_b4").default_cfg["tag"] == "in22k_ft_in1k"
        assert backbones.create_model("van_b5").num_classes == 1000
        both = backbones.create_model("van_b4.in22k", pretrained_cfg="in22k_ft_in1k")
        assert (both.num_classes, both.default_cfg["tag"]) == (1000, "in22k_ft_in1k")
        overlay = {"crop_pct": 1.0, "num_classes": 3}
        model = backbones.create_model("van_b0", pretrained_cfg_overlay=overlay)
        assert (model.pretrained_cfg["crop_pct"], model.num_classes) == (1.0, 3)
        tagged = backbones.create_model("van_b0.in1k", pretrained_cfg_overlay=overlay)
        assert (tagged.default_cfg["tag"], tagged.num_classes) == ("in1k", 3)
        assert backbones.create_model("van_b0", num_classes=None).num_classes == 1000
    config = timm.data.resolve_model_data_config(model)
    assert (config["crop_pct"], config["mean"]) == (1.0, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", [n for n in TIMMS_OWN if n in backbones.list_models()])
def test_timm_keeps_its_own_names(name: str) -> None:
    assert timm.models.model_entrypoint(name).__module__.startswith("timm.models.")
    assert any(n.startswith(f"{name}.") for n in timm.list_models(pretrained=True))
    with outlines():
        assert type(backbones.create_model(name)).__module__.startswith("backbones.")


@pytest.mark.parametrize(
    "name", [n for n in backbones.list_models() if n not in TIMMS_OWN and not n.startswith("hat")]
)
def test_timm_makes_all_the_others(name: str) -> None:
    with outlines():
        model = timm.create_model(name, features_only=True, pretrained=False)
    plain = isinstance(model.model, IsotropicBackbone)
    assert model.feature_info.reduction() == ([16] * 4 if plain else [4, 8, 16, 32])
    assert type(model.model).__module__ == f"backbones.{_family(name)}"


def _family(name: str) -> str:
    return next(f for f in backbones.list_families() if name in backbones.list_models(family=f))


def _newcomer(monkeypatch: pytest.MonkeyPatch, **variants: Any) -> types.ModuleType:
    """A module with these names and cfgs of two."""
    module = types.ModuleType("newcomer")
    module.default_cfgs = {"van_b0.x": {}, "van_b98.x": {"num_classes": 7}}
    vars(module).update(variants)
    monkeypatch.setitem(sys.modules, "newcomer", module)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(timm.models, "register_model", lambda entrypoint: entrypoint)
    return module


def test_variants_are_registered_by_the_names_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _newcomer(monkeypatch, van_b98=variant(VAN, dims=(8,) * 4, depths=[1, 1, 1, 1]))
    module.van_also = module.van_b98
    register_variants("newcomer")
    assert module.van_b98.__doc__ == "VAN(dims=(8, 8, 8, 8), depths=[1, 1, 1, 1])."
    assert (module.van_b98.__name__, module.van_b98.__module__) == ("van_b98", "newcomer")
    assert backbones.list_models(family="newcomer") == ["van_b98"]
    with outlines():
        model = backbones.create_model("van_b98", dims=(8, 8, 8, 16))
    assert isinstance(model, VAN)
    assert (model.num_classes, model.num_features, len(model.stages[2].blocks)) == (7, 16, 1)
    register_variants("newcomer")  # nothing is left to register


def test_a_function_is_registered_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def van_b98(pretrained: bool = False, **kwargs: Any) -> VAN:
        return registry.build_model(VAN, "van_b98", pretrained, {"depths": (1, 1, 1, 1)}, kwargs)

    module = _newcomer(monkeypatch)
    module.default_cfgs = generate_default_cfgs(module.default_cfgs)
    van_b98.__module__ = "newcomer"
    with pytest.warns(DeprecationWarning, match=r"register_variants\(__name__\)"):
        assert register(van_b98) is van_b98
    with outlines():
        assert len(backbones.create_model("van_b98").stages[2].blocks) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("van_b0", r"'van_b0' is already registered \(van\)"),
        ("van_b99", "newcomer has no entry for 'van_b99'"),
    ],
)
def test_duplicates_and_missing_cfgs_raise(
    monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    _newcomer(monkeypatch, **{name: variant(VAN)})
    with pytest.raises(ValueError, match=said):
        register_variants("newcomer")


# ---- the base class ------------------------------------------------------------------------------
@torch.no_grad()
def test_a_map_with_its_own_norm_is_not_normalised_twice() -> None:
    model = randomise(small("litv2", out_norms=True)).eval()
    x = images(1, 3, 64, 64)
    plain, normed = (
        model.forward_intermediates(x, norm=norm, intermediates_only=True) for norm in (False, True)
    )
    torch.testing.assert_close(normed, plain)


def test_pruning_removes_the_norms_and_the_head_that_nothing_needs() -> None:
    with outlines():
        model = small("litv2", out_norms=True, num_classes=5)
        assert model.prune_intermediate_layers([1, 3], prune_head=False) == [1, 3]
        assert set(model.out_norms) == {"1", "3"} and model.num_classes == 5
        model.prune_intermediate_layers([3])
        assert set(model.out_norms) == {"3"} and model.num_classes == 0
        model.prune_intermediate_layers([0])
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 16, 16)


def test_a_downsampling_layer_learns_with_the_block_after_it() -> None:
    with outlines():
        model = small("van")
        groups = group_parameters(model, model.group_matcher(), reverse=True)
    of_block = {groups[n] for n in groups if n.startswith("stages.2.blocks.0.")}
    assert {groups[n] for n in groups if n.startswith("stages.2.downsample.")} == of_block
    assert of_block != {groups[n] for n in groups if n.startswith("stages.2.blocks.1.")}
