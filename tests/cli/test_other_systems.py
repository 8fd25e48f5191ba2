"""Training, embedding and upscaling do without what Windows lacks."""

from __future__ import annotations

import pytest
from clones import ROOT
from embedding_runs import make_photos, tiny_checkpoint, words
from fresh_python import run_code
from PIL import Image
from restoration_runs import QUICK as QUICK_SR
from restoration_runs import make_pictures
from training_runs import QUICK, make_images
from without_unix import WITHOUT_UNIX

import backbones
from backbones.common.files import save_weights
from backbones.embedding import table

_RUN = f"""
{WITHOUT_UNIX}
if __name__ == "__main__":
    sys.path.insert(0, {str(ROOT)!r})
    from torch.utils.data._utils import signal_handling
    signal_handling.IS_WINDOWS = True  # torch looks at sys.platform, not at what there is
    from importlib import import_module
    sys.exit(import_module(sys.argv[1]).main(sys.argv[2:]))
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training(workers, tmp_path):
    images = make_images(tmp_path / "images", {"train": 16, "val": 6})
    options = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--epochs=1")
    said = run_code(_RUN, tmp_path, "train_cls", *QUICK, *options, f"--workers={workers}")
    assert "no flock" in said  # two runs in one folder are not prevented
    assert (tmp_path / "run" / "last.pt").exists()


def test_upscaling(tmp_path):
    folders = [make_pictures(tmp_path / name, 2) for name in ("train", "val")]
    options = [f"--{path.name}-pictures={path}" for path in folders]
    output = (f"--output={tmp_path}", "--name=run", "--epochs=1")
    run_code(_RUN, tmp_path, "backbones.restoration.train", *QUICK_SR, *options, *output)
    assert (tmp_path / "run" / "last.pt").exists()
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, backbones.create_model("hat_nano_x2").state_dict(), {})
    argv = ("upscale", str(folders[0] / "0.png"), "--model=hat_nano_x2", f"--checkpoint={weights}")
    run_code(_RUN, tmp_path, "backbones.cli.main", *argv, "--out=large")
    with Image.open(tmp_path / "large" / "0_x2.png") as large:
        assert large.size == (88, 80)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_embedding(processes, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model")
    argv = words(make_photos(tmp_path / "photos", 8), tmp_path / "out", checkpoint)
    run_code(_RUN, tmp_path, "backbones.cli.main", *argv, f"--workers={processes}")
    keys, vectors = table.load(tmp_path / "out")
    assert len(keys) == len(vectors) == 8
