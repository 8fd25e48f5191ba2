"""Dense networks, as the papers' detectors and segmenters have them: the published maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import assert_maps, dense_weights

import backbones
from backbones.cli.parity import reference, tolerance, variants

FAMILIES = ("biformer", "dinat_s", "litv2", "nat", "overlock", "ravlt", "unireplknet")
QUICK = {
    *("biformer_tiny", "litv2_s", "nat_mini", "overlock_xt", "ravlt_t", "ravlt_s"),
    *("unireplknet_a", "unireplknet_n", "favit_b0", "van_b0", "vig_h_t", "vmamba_tiny_s2l5"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "favit": {},
    "overlock": {"out_norms": True, "overview_feature": True},
    "van": {"norm_eps": 1e-5},
}


def _cases() -> list[Any]:
    """The last case of each variant, whose size divides by least, and all with dilations."""
    cases = []
    for family, variant in variants():
        figures = reference(family, variant)
        has_norms = family in FAMILIES and figures.get("dense_extra")
        if not (has_norms or variant in QUICK) or figures["params"] > 2.5e8:
            continue
        numbers = [("dense_cases", n) for n in range(len(figures.get("dense_cases", ())))]
        if family != "ravlt":
            numbers.append(("cases", len(figures["cases"]) - 1))
        for key, number in numbers:
            small = variant == "dinat_mini" and figures[key][number]["input"][3] == 202
            slow = () if small or variant in QUICK else (pytest.mark.slow,)
            cases.append(pytest.param(family, variant, key, number, marks=slow))
    return cases


@pytest.mark.parametrize(("family", "variant", "key", "number"), _cases())
@torch.no_grad()
def test_published_maps(family, variant, key, number):
    figures = reference(family, variant)
    case = figures[key][number]
    options = {n: v for n, v in case.get("kwargs", {}).items() if n == "n_win"}
    options |= OPTIONS.get(family, {"out_norms": True})
    if "dilations" in case:  # on maps that are smaller than windows, most of them
        options["dilations"] = [tuple(stage) for stage in case["dilations"]]
        options["kernel_size"] = case["kernel_size"]
    model = backbones.create_model(variant, num_classes=0, **options).eval()
    if "dense" in figures:
        assert sum(p.numel() for p in model.parameters()) == figures["dense"]["params"]
    weights = dense_weights(figures)
    for name in [n for n in weights if n.endswith("qkv_proj.weight")]:
        weights[name] = weights[name][..., None, None]  # ViG's loader takes 1×1 convolutions, too
    report = backbones.load_checkpoint(model, weights, strict=False)
    assert report.missing == ["norm.weight", "norm.bias"] * (family in ("vig", "vmamba"))
    assert not (report.unexpected or report.resized or report.reinitialised)
    # OverLoCK's detectors take another last map than its segmenters.
    expected = [*case["features"][:-1], case.get("features_detection_last", case["features"][-1])]
    assert_maps(model, case, tolerance(family), expected)
    if "dilations" in case:
        model.out_norms.clear()
        assert_maps(model, case, tolerance(family), case["stage_outputs"])
    if family in ("overlock", "unireplknet"):  # in which the original's merging fails
        assert_maps(model.fuse(), case, 10 * tolerance(family), expected)
