"""Which validation images a finished run shows."""

from contextlib import nullcontext

import torch

from backbones.training.pictures import pick_predictions

CONFIG = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}


class Sure(torch.nn.Module):
    """Answers the first of two classes, the surer the brighter an image is."""

    def forward(self, x):
        return torch.stack([x[:, 2, 0, 0], torch.zeros(len(x))], 1)


def test_the_surest_mistakes_come_first():
    """Each is the picture before its normalisation; those without a label are left out."""
    brightness = torch.linspace(0.1, 0.9, 48)
    images = torch.zeros(48, 3, 4, 4)
    images[:, 2] = brightness[:, None, None]
    labels = torch.tensor([1, 0, 0, -1] * 12)
    batches = zip(images.split(16), labels.split(16), strict=True)
    shown = pick_predictions(Sure(), batches, CONFIG, nullcontext)
    assert [p.truth for p in shown] == [1] * 8 + [0] * 24 and {p.answer for p in shown} == {0}
    mistakes = brightness[labels == 1].flip(0)[:8]
    for prediction, bright in zip(shown, mistakes.tolist(), strict=False):
        torch.testing.assert_close(
            torch.tensor(prediction.image[0, 0]), torch.tensor([0.5, 0.25, bright])
        )
        assert abs(prediction.confidence - torch.tensor(bright).sigmoid()) < 1e-6
