"""The smallest model of each of timm's modules, and images for it; small networks."""

from __future__ import annotations

import warnings
from typing import Any

import timm
import torch
import transformers
from timm.models import model_entrypoint
from torch import Tensor, nn

_NAMES = (
    *("beit_base_patch16_224", "halonet_h1", "test_byobnet", "cait_xxs24_224", "coat_tiny"),
    *("convit_tiny", "convmixer_768_32", "test_convnext", "cpubone_nano", "crossvit_tiny_240"),
    *("csatv2", "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny", "deepseek_vit_412m"),
    *("deit_tiny_patch16_224", "densenet121", "dla46x_c", "dpn48b", "edgenext_xx_small"),
    *("efficientformer_l1", "efficientformerv2_s0", "test_efficientnet", "efficientvim_m1"),
    *("efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0"),
    *("fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050"),
    *("hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small"),
    *("iformer_t", "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4"),
    *("lcnetv2_small", "levit_128s", "lowformer_b0", "test_mambaout", "test_coatnet"),
    *("poolformerv2_s12", "gmlp_ti16_224", "mobilenetv3_small_050", "mobilenetv5_base"),
    *("mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap", "nasnetalarge"),
    *("nest_tiny_jx", "nextvit_small", "test_nfnet", "pit_ti_224", "pnasnet5large", "pvt_v2_b0"),
    *("qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50"),
    *("resnest14d", "test_resnet", "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18"),
    *("sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window16_256", "swinv2_cr_tiny_224"),
    *("tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11"),
    *("visformer_tiny", "test_vit", "vit_tiny_r_s16_p8_224", "test_vit_relpos"),
    *("samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224", "ese_vovnet19b_slim_dw"),
    *("legacy_xception", "xception41p", "xcit_nano_12_p8_224"),
)
# By timm's module.
SMALLEST = {model_entrypoint(name).__module__.rpartition(".")[2]: name for name in _NAMES}
# Arguments and sides of those that take minutes otherwise.
_SHORT = {"deepseek_vit": 84, "gemma4_vit": 96, "qwen3_vit": 96}


def network(module: str, images: int = 1, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    """A model with norms and scales that change their input, and images for it."""
    torch.manual_seed(0)
    short = {"depth": 2} if module in _SHORT else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm: names that it has deprecated
        model = timm.create_model(SMALLEST[module], **short, **kwargs).eval()
    side = _SHORT.get(module, model.pretrained_cfg["input_size"][-1])
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.1)
    return model, torch.randn(images, 3, side, side)


class Branching(nn.Module):
    """A network whose course depends on values, so that it is not recorded as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network("resnet")[0]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x) if x.mean() > 0 else -self.body(x)
        return result


def vit_of_transformers() -> nn.Module:
    """With two blocks, for images of 32 × 32."""
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        image_size=32, patch_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.ViTModel(config).eval()
