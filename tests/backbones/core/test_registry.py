"""The factory: names, tags, keywords, cfgs, and what timm is given."""

from __future__ import annotations

import sys
import types

import pytest
import timm
import torch
from timm.models import generate_default_cfgs
from zoo import outlines

import backbones
from backbones import IsotropicBackbone
from backbones.core.registry import register

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


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown model 'van_b9'.*'van_b"):
        backbones.create_model("van_b9")
    with pytest.raises(ValueError, match="unknown tag of van_b0 'in2k'.*'in1k'"):
        backbones.create_model("van_b0.in2k")
    with pytest.raises(TypeError, match="van_b0: unknown keyword 'drop_path'.*'drop_path_rate'"):
        backbones.create_model("van_b0", drop_path=0.1)
    with pytest.raises(TypeError, match="features_only=True"):
        backbones.create_model("van_b0", out_indices=(0, 1))
    with pytest.raises(ValueError, match="num_classes.*-3"):
        backbones.create_model("van_b0", num_classes=-3)


def test_unknown_names_that_resemble_nothing() -> None:
    with pytest.raises(ValueError, match=r"unknown model '\.\./\.\./etc/passwd'; "):
        backbones.create_model("../../etc/passwd")
    with pytest.raises(ValueError, match="unknown model 'qqq'; ") as raised:
        backbones.create_model("qqq")
    assert "backbones.list_models()" in str(raised.value)
    assert "van_b0" not in str(raised.value)
    with pytest.raises(ValueError, match="unknown family 'qqq'; valid: 'biformer', .*'van'"):
        backbones.list_models(family="qqq")


@pytest.mark.parametrize("rate", [2.0, -0.1, float("nan")])
@pytest.mark.parametrize("keyword", ["drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_rates_outside_their_range_are_refused(keyword: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"^{keyword} must be in 0 … 1, got {rate}"):
        backbones.create_model("favit_b0", **{keyword: rate})


@pytest.mark.parametrize("family", backbones.list_families())
def test_every_family_refuses_a_rate(family: str) -> None:
    (name, *_) = backbones.list_models(family=family)
    with pytest.raises(ValueError, match="drop_path_rate must be in 0 … 1, got 2"):
        backbones.create_model(name, drop_path_rate=2.0)


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


def test_duplicates_and_missing_cfgs_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("newcomer")
    module.default_cfgs = generate_default_cfgs({"van_b0.x": {}})
    monkeypatch.setitem(sys.modules, "newcomer", module)

    def van_b0() -> None: ...

    def van_b99() -> None: ...

    van_b0.__module__ = van_b99.__module__ = "newcomer"
    with pytest.raises(ValueError, match="'van_b0' is already registered"):
        register(van_b0)
    with pytest.raises(ValueError, match="newcomer has no entry for 'van_b99'"):
        register(van_b99)


def test_fuse_takes_backbones_inside_other_modules() -> None:
    wrapped = torch.nn.Sequential(backbones.create_model("van_b0", num_classes=0))
    assert backbones.fuse(wrapped)[0].fused
