"""The structure of each family's blocks, for the diagrams of the site.

Follows the ``forward`` methods in ``backbones/`` and ``ops/``; stochastic depth is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from block_diagrams import Box, Branches, Residual, Step


def norm(label: str = "LayerNorm") -> Box:
    return Box(label, "norm")


def conv(label: str, detail: str = "") -> Box:
    return Box(label, "conv", detail)


def attn(label: str, detail: str = "") -> Box:
    return Box(label, "attn", detail)


def mlp(label: str, detail: str = "") -> Box:
    return Box(label, "mlp", detail)


def act(label: str) -> Box:
    return Box(label, "act")


def note(label: str) -> Box:
    return Box(label, "note")


def _transformer_block(attention: Box, feed_forward: Box) -> list[Step]:
    return [Residual([norm(), attention]), Residual([norm(), feed_forward])]


POSITION = Residual([conv("3×3 depthwise", "position")])
LOCAL = Residual([conv("3×3 depthwise")])
MOBILE_CONV = Residual([conv("3×3 depthwise", "batch norm")])
MOBILE_FFN = Residual([mlp("1×1, ReLU, 1×1", "twice as wide inside")])
DW_MLP = mlp("MLP", "3×3 depthwise inside")
NEIGHBORHOOD = attn("Neighborhood attention", "7×7, dilated or not")
NEIGHBORHOOD_STEPS: Sequence[Step] = [
    note("zeros around a map that is smaller than the window"),
    conv("Query, key, value"),
    attn("Attend", "to the window around each token, with a bias by offset"),
    note("cut off what was added"),
    conv("Linear"),
]

BLOCKS: dict[str, Sequence[tuple[str, Sequence[Step]]]] = {
    "biformer": (
        ("Block", [POSITION, *_transformer_block(attn("Bi-level routing attention"), mlp("MLP"))]),
        (
            "Bi-level routing attention",
            [
                conv("Query, key, value"),
                Branches(
                    [
                        [
                            attn("Route", "mean queries × mean keys of regions"),
                            attn("Gather", "keys, values of the top-k regions"),
                            attn("Attend", "tokens to the gathered tokens"),
                        ],
                        [conv("5×5 depthwise", "of the values")],
                    ],
                    "+",
                ),
                conv("Linear"),
            ],
        ),
    ),
    "dinat_s": (
        ("Block", _transformer_block(NEIGHBORHOOD, mlp("MLP"))),
        ("Neighborhood attention", NEIGHBORHOOD_STEPS),
        (
            "Merging",
            [note("2×2 tokens, side by side"), norm(), conv("Linear", "half as many channels")],
        ),
    ),
    "ecanet": (
        (
            "ResNet block",
            [
                Residual(
                    [
                        conv("Two 3×3, or 1×1, 3×3, 1×1", "batch norm each; ReLU between"),
                        attn("Efficient channel attention"),
                    ]
                ),
                act("ReLU"),
            ],
        ),
        (
            "MobileNetV2 block",
            [
                Residual(
                    [
                        mlp("1×1", "6 times as wide; batch norm, ReLU6"),
                        conv("3×3 depthwise", "batch norm, ReLU6"),
                        mlp("1×1", "narrow again; batch norm"),
                        attn("Efficient channel attention"),
                    ]
                )
            ],
        ),
        (
            "Efficient channel attention",
            [
                Branches(
                    [
                        [],
                        [
                            note("mean of each channel"),
                            conv("1-D convolution", "over 1 to 7 channels"),
                            act("Sigmoid"),
                        ],
                    ],
                    "×",
                )
            ],
        ),
    ),
    "efficientvit": (
        (
            "Block",
            [
                MOBILE_CONV,
                MOBILE_FFN,
                Residual([attn("Cascaded group attention", "in windows")]),
                MOBILE_CONV,
                MOBILE_FFN,
            ],
        ),
        (
            "Cascaded group attention",
            [
                note("channels split, one part a head"),
                Branches(
                    [
                        [attn("Head 1", "depthwise query"), note("out 1")],
                        [note("+ out 1"), attn("Head 2", "depthwise query"), note("out 2")],
                        [note("+ out 2"), attn("Head 3", "depthwise query"), note("…")],
                    ],
                    "concat",
                ),
                act("ReLU"),
                conv("1×1", "batch norm"),
            ],
        ),
    ),
    "favit": (
        ("Block", _transformer_block(attn("Factorized attention"), DW_MLP)),
        (
            "Factorized attention",
            [
                note("channels split; one projection makes all queries"),
                Branches(
                    [
                        [
                            note("1/8"),
                            conv("Strided convolution", "the map, sr_ratio times smaller"),
                            attn("Attend", "one head, global"),
                        ],
                        [
                            note("7/16"),
                            conv("3×3 depthwise, 1×1"),
                            attn("Fuse windows", "7×7 taps, dilation 1"),
                            attn("Attend", "to 49 tokens"),
                        ],
                        [
                            note("7/16"),
                            conv("3×3 depthwise, 1×1"),
                            attn("Fuse windows", "7×7 taps, dilation sr_ratio"),
                            attn("Attend", "to 49 tokens"),
                        ],
                    ],
                    "concat",
                ),
                conv("Linear"),
            ],
        ),
    ),
    "hat": (
        (
            "Residual group",
            [
                Residual(
                    [
                        Box("Hybrid block × depth", "plain", "every second one shifted"),
                        Box("Overlap block"),
                        conv("3×3"),
                    ]
                )
            ],
        ),
        (
            "Hybrid block",
            [
                Residual(
                    [
                        norm(),
                        Branches(
                            [
                                [attn("Window attention", "16×16, shifted or not")],
                                [conv("3×3, GELU, 3×3"), attn("Channel attention", "× 0.01")],
                            ],
                            "+",
                        ),
                    ]
                ),
                Residual([norm(), mlp("MLP")]),
            ],
        ),
        (
            "Overlap block",
            _transformer_block(
                attn("Overlapping window attention", "16×16 queries, 24×24 keys"), mlp("MLP")
            ),
        ),
    ),
    "inception_next": (
        (
            "Block",
            [
                Residual(
                    [
                        conv("Inception depthwise"),
                        norm("BatchNorm"),
                        mlp("1×1, GELU, 1×1"),
                        Box("Layer scale"),
                    ]
                )
            ],
        ),
        (
            "Inception depthwise convolution",
            [
                note("channels split"),
                Branches(
                    [
                        [note("5/8"), note("untouched")],
                        [note("1/8"), conv("3×3")],
                        [note("1/8"), conv("1×11")],
                        [note("1/8"), conv("11×1")],
                    ],
                    "concat",
                ),
            ],
        ),
    ),
    "litv2": (
        ("Stages 1 and 2", [Residual([norm(), DW_MLP])]),
        ("Stages 3 and 4", _transformer_block(attn("HiLo attention"), DW_MLP)),
        (
            "HiLo attention",
            [
                Branches(
                    [
                        [
                            note("1 − α of the heads"),
                            attn("Hi-Fi", "within 2×2 windows"),
                            conv("Linear"),
                        ],
                        [
                            note("α of the heads"),
                            attn("Lo-Fi", "to averages of 2×2 windows"),
                            conv("Linear"),
                        ],
                    ],
                    "concat",
                ),
            ],
        ),
    ),
    "medvitv2": (
        (
            "Local block",
            [
                Residual([norm("BatchNorm"), attn("Neighborhood attention", "7×7")]),
                Residual(
                    [
                        norm("BatchNorm"),
                        Residual(
                            [
                                mlp("1×1, Hardswish"),
                                conv("Depthwise, Hardswish"),
                                attn("Squeeze-and-excitation"),
                                mlp("1×1"),
                            ]
                        ),
                    ]
                ),
            ],
        ),
        (
            "Global block",
            [
                conv("1×1", "to ¾ of the channels"),
                Residual([norm("BatchNorm"), attn("Pooled attention")]),
                Branches(
                    [
                        [note("¾ of the channels")],
                        [conv("1×1", "to ¼ of the channels"), Residual([conv("Grouped 3×3, 1×1")])],
                    ],
                    "concat",
                ),
                Residual([norm("BatchNorm"), mlp("Kolmogorov-Arnold layers")]),
            ],
        ),
    ),
    "nat": (
        ("Block", _transformer_block(NEIGHBORHOOD, mlp("MLP"))),
        ("Neighborhood attention", NEIGHBORHOOD_STEPS),
    ),
    "nat_isotropic": (
        (
            "Block",
            _transformer_block(
                attn("Attention", "of neighbours, dilated or not, or of all"), mlp("MLP")
            ),
        ),
        ("Neighborhood attention", NEIGHBORHOOD_STEPS),
    ),
    "overlock": (
        (
            "Block of the Base-Net and the Overview-Net",
            [
                LOCAL,
                Residual(
                    [
                        norm(),
                        conv("Depthwise", "large and re-parameterised"),
                        norm("BatchNorm"),
                        attn("Squeeze-and-excitation"),
                        mlp("MLP", "3×3 depthwise, response norm inside"),
                    ]
                ),
                note("the shortcut has a layer scale at strides 16 and 32"),
            ],
        ),
        (
            "Dynamic block of the Focus-Net",
            [
                note("map, and its context + the overview's"),
                LOCAL,
                Residual(
                    [
                        norm(),
                        conv("3×3 depthwise, 1×1", "map and context: the values"),
                        Branches(
                            [
                                [attn("Dynamic convolution")],
                                [conv("Depthwise", "large and re-parameterised")],
                            ],
                            "+",
                        ),
                        attn("Squeeze-and-excitation"),
                        attn("× gate", "of the values"),
                        conv("1×1"),
                    ]
                ),
                LOCAL,
                Residual([norm(), mlp("MLP", "3×3 depthwise, response norm inside")]),
            ],
        ),
        (
            "Dynamic convolution",
            [
                attn("Affinities", "queries of the map × keys of 7×7 regions of the context"),
                conv("Linear", "49 affinities to the taps of two kernels"),
                Branches(
                    [
                        [
                            attn("Bias by offset, softmax", "over 5×5 taps"),
                            conv("Weigh the window", "first half of the values"),
                        ],
                        [
                            attn("Bias by offset, softmax", "over 13×13 or 7×7 taps"),
                            conv("Weigh the window", "second half of the values"),
                        ],
                    ],
                    "concat",
                ),
                conv("1×1"),
            ],
        ),
    ),
    "proxylessnas": (
        (
            "Block",
            [
                Residual(
                    [
                        mlp("1×1", "3 or 6 times as wide"),
                        norm("BatchNorm"),
                        act("ReLU6"),
                        conv("Depthwise", "3×3, 5×5 or 7×7, as searched"),
                        norm("BatchNorm"),
                        act("ReLU6"),
                        mlp("1×1", "narrow again"),
                        norm("BatchNorm"),
                    ]
                )
            ],
        ),
    ),
    "ravlt": (
        (
            "Block",
            [
                POSITION,
                Residual([norm(), attn("Rank-augmented attention"), Box("Layer scale")]),
                Residual([norm(), mlp("MLP", "3×3 depthwise inside"), Box("Layer scale")]),
            ],
        ),
        (
            "Rank-augmented linear attention",
            [
                conv("Query, key, value, gate"),
                Branches(
                    [
                        [
                            attn("ELU + 1", "of queries and keys"),
                            attn("Weigh the keys", "by the mean query's attention"),
                            attn("Linear attention", "rotary positions"),
                        ],
                        [conv("5×5 depthwise", "of the values")],
                    ],
                    "+",
                ),
                attn("× gate"),
                conv("Linear"),
            ],
        ),
    ),
    "shvit": (
        (
            "Block",
            [
                MOBILE_CONV,
                Residual([attn("Single-head attention", "from the second stage on")]),
                MOBILE_FFN,
            ],
        ),
        (
            "Single-head attention",
            [
                note("channels split"),
                Branches(
                    [
                        [
                            note("attn_dim"),
                            norm("GroupNorm"),
                            conv("1×1: query, key, value"),
                            attn("Attention", "one head, all positions"),
                        ],
                        [note("the rest, untouched")],
                    ],
                    "concat",
                ),
                act("ReLU"),
                conv("1×1", "batch norm"),
            ],
        ),
    ),
    "unireplknet": (
        (
            "Block",
            [
                Residual(
                    [
                        conv("Depthwise", "3×3, or large and re-parameterised"),
                        norm("BatchNorm"),
                        attn("Squeeze-and-excitation"),
                        mlp("Linear, GELU"),
                        norm("Global response norm"),
                        mlp("Linear"),
                        norm("BatchNorm"),
                        Box("Layer scale"),
                    ]
                )
            ],
        ),
        (
            "Large kernel while training (13×13)",
            [
                Branches(
                    [
                        [conv("13×13"), norm("BN")],
                        [conv("5×5"), norm("BN")],
                        [conv("7×7", "dilation 2"), norm("BN")],
                        [conv("Three of 3×3", "dilation 3, 4, 5"), norm("BN each")],
                    ],
                    "+",
                ),
            ],
        ),
        ("The same after fuse()", [conv("13×13", "all batch norms folded")]),
    ),
    "van": (
        (
            "Block",
            [
                Residual([norm("BatchNorm"), attn("Large-kernel attention"), Box("Layer scale")]),
                Residual(
                    [
                        norm("BatchNorm"),
                        mlp("1×1"),
                        conv("3×3 depthwise"),
                        act("GELU"),
                        mlp("1×1"),
                        Box("Layer scale"),
                    ]
                ),
            ],
        ),
        (
            "Large-kernel attention",
            [
                Residual(
                    [
                        conv("1×1"),
                        act("GELU"),
                        Branches(
                            [
                                [
                                    conv("5×5 depthwise"),
                                    conv("7×7 depthwise", "dilation 3"),
                                    conv("1×1"),
                                ],
                                [],
                            ],
                            "×",
                        ),
                        conv("1×1"),
                    ]
                )
            ],
        ),
    ),
    "vig": (
        (
            "Block",
            [
                Residual([norm("RMSNorm"), attn("Bidirectional gated attention")]),
                Residual([norm("RMSNorm"), mlp("Gated MLP", "SiLU")]),
            ],
        ),
        (
            "Bidirectional gated attention",
            [
                conv("3×3 depthwise"),
                Branches(
                    [
                        [
                            conv("Query, key, value, gates"),
                            attn("Scan", "forward + backward"),
                            norm("RMSNorm"),
                            note("× g"),
                        ],
                        [norm("RMSNorm"), note("× (1 − g)")],
                    ],
                    "+",
                ),
                conv("Linear"),
            ],
        ),
    ),
    "vmamba": (
        (
            "Block",
            [
                Residual([norm(), attn("Selective scans")]),
                Residual([norm(), mlp("MLP", "not in vanilla_*")]),
            ],
        ),
        (
            "Selective scans",
            [
                conv("Linear"),
                conv("3×3 depthwise"),
                act("SiLU"),
                Branches(
                    [
                        [conv("Step, B, C"), attn("Scan", "by row")],
                        [conv("Step, B, C"), attn("Scan", "by column")],
                        [conv("Step, B, C"), attn("Scan", "by row, reversed")],
                        [conv("Step, B, C"), attn("Scan", "by column, reversed")],
                    ],
                    "+",
                ),
                norm(),
                note("vanilla_*: × SiLU of a second projection"),
                conv("Linear"),
            ],
        ),
    ),
    "vrwkv": (
        (
            "Block",
            [
                Residual([norm(), attn("Bi-WKV", "VRWKV6: gated scan")]),
                Residual([norm(), mlp("Gated MLP", "squared ReLU")]),
            ],
        ),
        (
            "Bi-WKV",
            [
                conv("Mix with neighbours"),
                Branches(
                    [
                        [conv("Key, value"), attn("Scan", "forward + backward")],
                        [conv("Receptance"), act("Sigmoid")],
                    ],
                    "×",
                ),
                conv("Linear"),
            ],
        ),
        (
            "Gated scan (VRWKV6)",
            [
                conv("Mix with neighbours", "in shares of the tokens' own"),
                Branches(
                    [
                        [
                            conv("Query, key, value, decay"),
                            attn("Scan", "forward + backward"),
                            norm("Norm of heads"),
                        ],
                        [conv("Gate"), act("SiLU")],
                    ],
                    "×",
                ),
                conv("Linear"),
            ],
        ),
        (
            "Gated MLP",
            [
                conv("Mix with neighbours"),
                Branches(
                    [
                        [conv("Linear"), act("Squared ReLU"), conv("Linear")],
                        [conv("Linear"), act("Sigmoid")],
                    ],
                    "×",
                ),
            ],
        ),
    ),
}
