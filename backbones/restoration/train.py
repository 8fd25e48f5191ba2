"""Training of restoration models, as HAT was trained (https://arxiv.org/abs/2205.04437): L1."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.common.errors import DataError, RecipeError
from backbones.common.progress import duration
from backbones.data.corrupt import CorruptImages
from backbones.restoration.data import (
    Pair,
    PatchLoader,
    degrade_picture,
    find_pictures,
    load_truth,
)
from backbones.restoration.metrics import quality, quantize
from backbones.restoration.panels import Panel, draw_panels, most_detailed_window
from backbones.restoration.pictures import PictureError, read_size
from backbones.restoration.recipe import RestorationRecipe
from backbones.restoration.resize import resize_bicubic
from backbones.training.build import build_model
from backbones.training.loop import TrainingLoop
from backbones.training.record import means_of
from backbones.training.run import run_from_command_line
from ops.tiling import run_tiled

_VAL_OVERLAP = 32
_SMALLEST = 11  # the window of SSIM, within the border that does not count
_SMALL = 32


def build_restorer(recipe: RestorationRecipe) -> Any:
    """The network of the recipe."""
    model = build_model(recipe, None)
    scale = getattr(model, "upscale", None)
    if scale is None:
        raise RecipeError(f"{recipe.model} does not output images: use one of list_models('hat*')")
    if recipe.task in ("denoise", "jpeg") and scale != 1:
        raise RecipeError(
            f"task {recipe.task} keeps the size, but {recipe.model} enlarges {scale} times: "
            "give --model-args '{upscale: 1}'"
        )
    if recipe.task == "sr" and scale == 1:
        raise RecipeError("task sr needs a model whose upscale is 2, 3 or 4, not 1")
    return model


class RestorationTrainer(TrainingLoop):
    """Training with the L1 loss on degraded patches; the best weights are selected by PSNR-Y."""

    score_key = "psnr_y"
    factors: ClassVar[Mapping[str, float]] = {"loss": 1.0}
    count_of_sums = 2
    texts: ClassVar[Mapping[str, str]] = {
        **{"train_loss": "L1 {:.4f}", "val_psnr_y": "validation {:.2f} dB"},
        **{"ema_psnr_y": "averaged {:.2f} dB", "images_per_second": "{:.0f} patches/s"},
    }
    recipe: RestorationRecipe

    def prepare(self) -> None:
        recipe = self.recipe
        model = build_restorer(recipe).to(self.device)
        self.scale: int = model.upscale
        self.train_loader = PatchLoader(
            find_pictures(recipe.train_pictures, True),
            recipe,
            self.scale,
            self.world,
            CorruptImages(self.folder / "corrupt_train.txt", recipe.max_corrupt),
        )
        self.val_paths = find_pictures(recipe.val_pictures, False)
        least = math.ceil(_SMALLEST / self.scale + 2) * self.scale
        for path in self.val_paths:
            if min(read_size(path)) < least:
                raise DataError(f"val_pictures: {path} is smaller than {least}×{least} pixels")
        self.set_up(model, recipe.updates_per_epoch)
        if recipe.patch_size < _SMALL:
            small = torch.zeros(recipe.batch_size, recipe.in_chans, *2 * (recipe.patch_size,))
            large = torch.zeros(*small.shape[:2], *2 * (recipe.patch_size * self.scale,))
            self.dry_run((small.to(self.device), large.to(self.device)))

    # --- called by the loop

    def compute(self, batch: Pair) -> tuple[Tensor, Tensor]:
        degraded, truth = batch
        loss = F.l1_loss(self.net(degraded).float(), truth)
        total = loss.detach().double() * len(truth)
        return loss, torch.stack([total, torch.full_like(total, len(truth))])

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> tuple[dict[str, float], int]:
        """Mean PSNR and SSIM on luma over whole pictures, which are divided among processes."""
        model.eval()
        self.progress.begin("validation", len(self.val_paths))
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        rounds = math.ceil(len(self.val_paths) / self.world.size)
        for number in range(self.world.rank, rounds * self.world.size, self.world.size):
            if number < len(self.val_paths):
                degraded, truth = self.pair(number)
                after = quality(self.restore(model, degraded), truth, self.scale)
                sums += torch.tensor([*after.values(), 1.0], dtype=sums.dtype, device=self.device)
            if signal := self.stop_signal():
                return {}, signal
            if self.progress.live and self.progress.due():
                self.progress.show(number + 1, "")
        self.net.train()
        return means_of(self.world.sum(sums), {"psnr_y": 1.0, "ssim_y": 1.0}), 0

    def pair(self, number: int) -> Pair:
        """Input and ground truth of a validation picture, as (C, H, W)."""
        try:
            truth = load_truth(self.val_paths[number], self.recipe.in_chans, self.scale)
        except PictureError as error:
            raise DataError(f"val_pictures: {error}") from error
        return degrade_picture(self.recipe, truth, self.scale, number)

    def restore(self, model: nn.Module, degraded: Tensor) -> Tensor:
        """The model's output for (C, H, W), on the CPU."""
        x = degraded.unsqueeze(0).to(self.device)
        tile = self.recipe.val_tile or max(x.shape[2:])
        overlap = _VAL_OVERLAP if self.recipe.val_tile else 0
        with self.autocast():
            out = run_tiled(model, x, tile_size=tile, overlap=overlap, scale=self.scale)
        return out.squeeze(0).float().cpu()

    # --- reporting

    def show_results(self) -> None:
        """Draw a validation picture with the best weights."""
        model, best = list(self.models().values())[-1], self.folder / "best.safetensors"
        if best.exists():
            model.load_state_dict(safetensors.torch.load_file(best))
        self.draw_comparison(model.eval(), self.folder / "comparison.png")
        seconds = time.monotonic() - self.begun
        pairs = (self.pair(number) for number in range(len(self.val_paths)))
        inputs = ((resize_bicubic(small, self.scale), truth) for small, truth in pairs)
        qualities = [quality(image, truth, self.scale)["psnr_y"] for image, truth in inputs]
        before = sum(qualities) / len(qualities)
        what = "bicubic" if self.scale > 1 else "the input"
        self.progress.say(
            f"best {self.best:.2f} dB after {duration(seconds)}: {self.best - before:+.2f} dB over "
            f"{what} ({before:.2f} dB)"
        )

    @torch.inference_mode()
    def draw_comparison(self, model: nn.Module, path: Path) -> None:
        """A detail of input, bicubic (if sizes differ), result and ground truth.

        The metrics are for the whole picture.
        """
        degraded, truth = self.pair(0)
        ours = self.restore(model, degraded)
        before = quantize(resize_bicubic(degraded, self.scale))
        panels = [Panel("low resolution", degraded)] if self.scale > 1 else []
        for name, image in (("bicubic" if panels else "input", before), ("ours", ours)):
            figures = quality(image, truth, self.scale)
            text = f"{figures['psnr_y']:.2f} dB, SSIM {figures['ssim_y']:.4f}"
            panels.append(Panel(name, image, text))
        panels.append(Panel("truth", truth))
        window = most_detailed_window(truth, 128, self.scale)
        draw_panels(path, panels, window, f"{self.val_paths[0].name}, {self.recipe.model}")


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Run from a command line; the exit status."""
    return run_from_command_line(RestorationTrainer, RestorationRecipe, argv, description)
