"""The contenders of the neighborhood attention benchmark."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ops.neighborhood import install_as_natten

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("na_contenders")


@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation"),
    [((11,), (4,), 2), ((8, 7), (3, 3), 2), ((3, 5, 4), (2, 3, 4), 1)],
)
def test_contenders_compute_the_same(contenders: ModuleType, size, kernel_size, dilation) -> None:
    setting = contenders.Setting(size, kernel_size, 8, dilation)
    tensors = torch.randn(3, 2, *size, contenders.NUM_HEADS, 8)
    device = torch.device("cpu")
    true = contenders.contender("gather", setting, device)(*tensors)
    for name in ("tiled", "sdpa-mask", "split"):
        torch.testing.assert_close(contenders.contender(name, setting, device)(*tensors), true)


def test_old_natten_is_measured_or_the_reason_given(contenders: ModuleType) -> None:
    setting, device = contenders.Setting((9,), (3,), 8), torch.device("cpu")
    tensors = torch.randn(3, 1, 9, contenders.NUM_HEADS, 8)
    with pytest.raises(contenders.CannotRunError, match=r"0\.15 to 0\.19"):
        contenders.contender("natten-split", setting, device)(*tensors)
    with install_as_natten():
        out = contenders.contender("natten-split", setting, device)(*tensors)
    assert torch.equal(out, contenders.contender("split", setting, device)(*tensors))


def test_counts_operations(contenders: ModuleType) -> None:
    setting = contenders.Setting((4,), (3,), 5)
    assert setting.flops(batch=2, backward=False) == 2 * 2 * 2 * contenders.NUM_HEADS * 4 * 3 * 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_flex_attention_is_compiled_for_every_setting(contenders: ModuleType) -> None:
    device = torch.device("cpu")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for size, kernel_size in (((12,), (5,)), ((8, 6), (3, 3)), ((4, 5, 6), (2, 3, 3))):
            setting = contenders.Setting(size, kernel_size, 16)
            tensors = torch.randn(3, 1, *size, contenders.NUM_HEADS, 16)
            out = contenders.contender("flex", setting, device)(*tensors)
            true = contenders.contender("gather", setting, device)(*tensors)
            torch.testing.assert_close(out, true)
