"""Arguments that a family refuses, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
from zoo import outlines, small

import backbones

# Of a network of two stages.
_SHAPE = {"dims": ((16,), (32, 32)), "kernel_sizes": ((3,), (3, 3)), "expansions": ((1,), (3, 3))}
# Family or variant, arguments, and what the message says.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("biformer", {"head_dim": 7}, "dims must be multiples of head_dim 7"),
    ("biformer", {"dims": (64, 96, 128, 100)}, "num_heads must divide dim 100, got 8"),
    ("biformer", {"n_win": 0}, "n_win must be in 1 … 1024, got 0"),
    ("biformer", {"head_dim": 0}, "head_dim must be in 1 … 65536, got 0"),
    ("dinat_s", {"dilations": "mask2former"}, "dilations must be one of .*, got 'mask2former'"),
    ("ecanet", {"attn_kernel_sizes": (3, 4, 5, 7)}, r"attn_kernel_sizes\[1\] must be odd, got 4"),
    ("ecanet", {"attn_kernel_sizes": (3, 5)}, "must have a value for each of the 4"),
    ("ecanet", {"dims": (64, 96, 130, 192)}, "dims must be multiples of 4 with bottleneck"),
    ("eca_mobilenet_v2", {"dims": ((16,),)}, "dims"),
    ("eca_mobilenet_v2", {"dims": ((16,), ())}, "dims"),
    ("eca_mobilenet_v2", {"dims": ((16,), (0,))}, "dims"),
    ("efficientvit", {"img_size": 0}, "img_size"),
    ("efficientvit", {"kernel_sizes": (7, 5)}, "kernel_sizes"),
    ("hat", {"num_classes": 10}, "num_classes must be 0, got 10"),
    ("hat", {"upscale": 5}, "upscale must be one of 1, 2, 3, 4, got 5"),
    ("hat", {"squeeze_factor": 99}, "squeeze_factor 99 must be at most dim 24"),
    ("medvitv2", {"head_dim": 0}, "head_dim must be in 1 … 65536, got 0"),
    ("medvitv2", {"dilation": (1, 1)}, "the same length"),
    ("medvitv2", {"dims": (64, 128, 200, 512)}, "multiples of head_dim 32"),
    ("medvitv2", {"dilation": 0}, "dilation"),
    ("medvitv2", {"dims": (64, 64, 128, 256), "mix_ratio": 1.0}, "split into 64"),
    ("nat", {"dilations": "cocoa"}, "must be one of 'imagenet', .*, or numbers, got 'cocoa'"),
    ("nat", {"dilations": 0}, "dilations must be in 1 … 1024, got 0"),
    ("nat", {"dilations": (1, 2, 1)}, r"must .* the 4 stages of depths \(2, 1, 2, 1\)"),
    ("nat", {"dilations": (1, (1, 2), 1, 1)}, r"dilations\[1\] must .* 1 blocks, got \(1, 2\)"),
    ("nat", {"dilations": ((1, 0), 1, 1, 1)}, r"dilations\[0\]\[1\] must be in 1 … 1024, got 0"),
    ("nat", {"num_heads": (3, 4, 8, 16)}, "num_heads must divide embed_dim, got 3"),
    ("nat", {"kernel_size": 6}, "kernel_size must be odd, got 6"),
    (
        "nat",
        {**dict.fromkeys(("dims", "depths", "num_heads"), (16,) * 5), "dilations": "coco"},
        "are for 4 stages, got depths",
    ),
    ("nat_isotropic", {"dilations": (1,) * 5}, "must not be longer than the 4 blocks"),
    ("nat_isotropic", {"dilations": (1, 0)}, r"dilations\[1\] must be in 1 … 1024, got 0"),
    ("nat_isotropic", {"kernel_size": 4}, "kernel_size must be odd, got 4"),
    ("overlock", {"kernel_sizes": (17, 15, 11, 7)}, "kernel_sizes must be among .*, got 11"),
    ("overlock", {"num_heads": (3, 3)}, "divide half of the stage's channels, got 3 for 64"),
    ("overlock", {"out_norms": (4,)}, "out_norms must name stages 0 … 3"),
    ("proxyless_cpu", {"kernel_sizes": ((3,), (3,))}, "kernel_sizes must have the shape of dims"),
    ("proxyless_cpu", {"expansions": ((1,), (3, 0))}, "an expansion of 1 or more"),
    ("proxyless_cpu", {"kernel_sizes": ((3,), (4, 3))}, "odd kernel size .* got 4 and 3"),
    ("proxyless_cpu", {"kernel_sizes": ((3,), (3, 0))}, "odd kernel size .* got 0 and 3"),
    (
        "proxyless_cpu",
        {"kernel_sizes": ((3,), (0, 3)), "expansions": ((1,), (0, 3))},
        "stride 2 from 16 to 32",
    ),
    ("proxyless_cpu", {"dims": ((16, 16), (32, 32))}, "one block at stride 2|shape of dims"),
    ("proxyless_cpu", {"dims": ((16,), (32, 0))}, r"dims\[1\]\[1\] must be in 1"),
    ("shvit", {"attn_dims": (0, 1, 8)}, "attn_dims must be 0, or 2 or more"),
    ("unireplknet", {"global_pool": "fastcatavgmax"}, "global_pool"),
    ("unireplknet", {"kernel_sizes": (3, 12, 13, 13)}, "kernel"),
    ("unireplknet", {"kernel_sizes": (3, 13, 19, 13)}, "kernel"),
    ("unireplknet", {"kernel_sizes": (3, 13, 0, 13)}, "kernel"),
    ("van", {"mlp_ratios": (1e-3, 8, 4, 4)}, "mlp_ratios .* less than one channel for 32"),
    ("vig", {"num_heads": (5, 2, 3, 4)}, r"2 · num_heads must divide dim 64, got num_heads 5"),
    ("vig_t", {"num_heads": 5}, r"2 · num_heads must divide dim 192, got num_heads 5"),
    ("vmamba", {"num_states": 0}, "num_states must be in 1 … 256, got 0"),
    ("vmamba", {"scan_ratio": 0}, "scan_ratio must be above 0, got 0"),
    ("vmamba", {"scan_ratio": 0.01}, "scan_ratio 0.01 gives less than one channel for 48"),
    ("vmamba", {"dims": (1, 64, 96, 128)}, r"dims\[0\] must be in 2"),
    ("vrwkv", {"dim": 66}, "multiple of 4, got 66"),
    ("vrwkv", {"dim": 96, "gated": True}, "multiple of 64, got 96"),
    ("vrwkv", {"segments": -1}, "segments must be in 0"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_what_is_wrong_is_named(name, arguments, message):
    with outlines(), pytest.raises((ValueError, TypeError), match=message):
        if name in backbones.list_models():
            shape = _SHAPE if name.startswith("proxyless") else {}
            backbones.create_model(name, **{**shape, **arguments})
        else:
            small(name, **arguments)
