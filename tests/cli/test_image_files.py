"""Damaged image files give an image or a reason, whatever reads them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import damage, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from backbones.common.images import DECODE_ERRORS, read_pixels
from backbones.restoration.pictures import Picture, PictureError, read_picture, read_size
from backbones.restoration.pictures import write_picture as write


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


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # Pillow's, about damage that affects no pixel
def test_any_damage(examples, tmp_path):
    files = _sources(tmp_path)
    path = tmp_path / "any.png"
    whole = dict.fromkeys((read_pixels, read_size, read_picture), 0)

    @fuzz(examples)
    @given(st.sampled_from(files), damage())
    def check(whole_file: bytes, change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(whole_file))
        for read in whole:
            try:
                found = read(path)
            except (*DECODE_ERRORS, PictureError) as error:
                assert read is read_pixels or str(path) in str(error)
            else:
                found = getattr(found, "pixels", found)
                assert min(found if isinstance(found, tuple) else found.shape) > 0
                whole[read] += 1

    check()
    assert all(examples // 20 < count < examples for count in whole.values()), whole
