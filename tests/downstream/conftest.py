"""The page about other libraries, as code to run; and training on pictures of bright rectangles."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

PAGE = Path(__file__).parents[2] / "docs" / "downstream.md"


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """A function that runs the page's code below a heading, in an empty folder, once a module.

    Its models take seconds to make: each is trained by one test.
    """

    @functools.cache
    def run(heading: str) -> dict[str, Any]:
        section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert blocks
        names: dict[str, Any] = {}
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("page"))
            for block in blocks:
                assert len(block.splitlines()) <= 15
                exec(compile(block, str(PAGE), "exec"), names)
        return names

    return run


@pytest.fixture
def rectangles() -> tuple[Tensor, Tensor, Tensor]:
    """Images (4, 3, 64, 64) of noise and a bright rectangle; its mask and its corners (xyxy)."""
    generator = torch.Generator().manual_seed(0)
    images = 0.2 * torch.rand(4, 3, 64, 64, generator=generator)
    masks = torch.zeros(4, 64, 64, dtype=torch.long)
    corners = torch.tensor([[4, 8], [20, 12], [8, 24], [28, 28]])
    boxes = torch.cat([corners, corners + 28], 1)
    for image, mask, (left, top, right, bottom) in zip(images, masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
        image[:, mask.bool()] += 0.7
    return images, masks, boxes.float()


@pytest.fixture
def train() -> Callable[..., list[float]]:
    """A function that minimises ``loss()`` and returns its value at each step."""

    def run(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> list[float]:
        torch.manual_seed(0)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        values = []
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            values.append(value.item())
        return values

    return run
