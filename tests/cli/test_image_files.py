"""Damaged image files give an image or a reason within seconds, with both readers."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import backbones
from backbones.cli.predict import predict
from backbones.common.files import save_weights
from backbones.core.loaded import load
from backbones.restoration.pictures import Picture, PictureError, read_picture, read_size
from backbones.restoration.pictures import write_picture as write

EXAMPLES = 1000
LONGEST = 20.0  # seconds for one file, on a machine that does other things too
TINY = {"dims": [16, 24], "depths": [1, 1], "attn_dims": [0, 8]}


def _sources(folder: Path) -> list[bytes]:
    """Whole files of every format and mode."""
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    exif = colour.getexif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    exif.get_ifd(0x8769)[0x829A] = 0.5
    kinds = [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("TIFF", mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "F", "I", "I;16")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        *(("GIF", "P"), ("BMP", "RGB"), ("BMP", "P")),
    ]
    files = []
    for kind, mode in kinds:
        data = io.BytesIO()
        if mode == "I;16":
            image = Image.fromarray(random.integers(0, 65536, (9, 12), dtype=np.uint16))
        else:
            image = colour.quantize(8) if mode == "P" else colour.convert(mode)
        more = {} if kind in ("GIF", "BMP") else {"exif": exif}
        image.save(data, kind, **more)
        files.append(data.getvalue())
    for suffix in (".png", ".tif"):  # 16 bits of colour, which Pillow does not write
        deep = Picture(random.integers(0, 65536, (9, 12, 3), dtype=np.uint16))
        write(folder / f"deep{suffix}", deep)
        files.append((folder / f"deep{suffix}").read_bytes())
    return files


_NUMBERS = [0, 1, 99, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 10**5, 2**24, 2**31 - 1, 2**31, 2**32 - 1]


@st.composite
def damage(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """A file that was cut, overwritten with bytes or large numbers, or had some put in."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        # Heads and directories lie at the ends.
        far = draw(st.sampled_from([32, 128, len(data)]))
        place = draw(st.integers(0, max(min(far, len(data)) - 1, 0)))
        if draw(st.integers(0, 3)) == 0:
            place = max(len(data) - 1 - place, 0)
        how = draw(st.sampled_from(["cut", "bytes", "number", "put in", "left out"]))
        if how == "cut":
            del data[place:]
        elif how == "bytes":
            new = draw(st.binary(min_size=1, max_size=8))
            data[place : place + len(new)] = new
        elif how == "number":
            form = draw(st.sampled_from([">I", "<I", ">H", "<H"]))
            limit = 2 ** (8 * struct.calcsize(form)) - 1
            new = struct.pack(form, min(draw(st.sampled_from(_NUMBERS)), limit))
            data[place : place + len(new)] = new
        elif how == "put in":
            data[place:place] = draw(st.binary(min_size=1, max_size=40))
        else:
            del data[place : place + draw(st.integers(1, 40))]
    return bytes(data)


@pytest.mark.slow
def test_any_damage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = backbones.create_model("shvit_s1", num_classes=3, **TINY)
    save_weights(tmp_path / "best.safetensors", model.state_dict(), {"model": "shvit_s1"})
    recipe = {"model": "shvit_s1", "model_args": TINY, "num_classes": 3, "img_size": 32}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**recipe, "data": "x"}))
    loaded = load(None, tmp_path / "best.safetensors")
    files = _sources(tmp_path)
    path = tmp_path / "any.png"
    whole = {"predict": 0, "upscale": 0}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damage(files))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        begun = time.monotonic()
        (answer,) = predict(loaded, [path])
        assert bool(answer.classes) is not bool(answer.error)
        assert "\n" not in answer.error
        whole["predict"] += not answer.error
        for read in (read_size, read_picture):
            try:
                found = read(path)
            except PictureError as error:
                assert str(path) in str(error)
            else:
                size = found if isinstance(found, tuple) else found.pixels.shape[:2]
                assert min(size) > 0
                whole["upscale"] += isinstance(found, Picture)
        assert time.monotonic() - begun < LONGEST

    check()
    assert all(EXAMPLES // 20 < count < EXAMPLES for count in whole.values()), whole
