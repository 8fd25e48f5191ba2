"""Damaged image files give an image or a reason within seconds, with both readers."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from embedding_runs import tiny_checkpoint
from fuzzing import damage, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from backbones.cli.predict import predict
from backbones.core.loaded import load
from backbones.restoration.pictures import Picture, PictureError, read_picture, read_size
from backbones.restoration.pictures import write_picture as write

EXAMPLES = 1000
LONGEST = 20.0  # seconds for one file, on a machine that does other things too


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


@pytest.mark.slow
def test_any_damage(tmp_path):
    loaded = load(None, tiny_checkpoint(tmp_path, classes=3))
    files = _sources(tmp_path)
    path = tmp_path / "any.png"
    whole = {"predict": 0, "upscale": 0}

    @fuzz(EXAMPLES)
    @given(st.sampled_from(files), damage())
    def check(whole_file: bytes, change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(whole_file))
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
