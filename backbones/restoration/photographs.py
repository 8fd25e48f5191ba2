"""Photographs bundled with scikit-image and scikit-learn, which need no download."""

from __future__ import annotations

from pathlib import Path

from backbones.common.errors import DataError

TRAINING = (
    *("coffee.png", "rocket.jpg", "camera.png", "brick.png", "grass.png", "gravel.png"),
    *("coins.png", "moon.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
    *("motorcycle_left.png", "motorcycle_right.png", "china.jpg"),
)
"""A scene that is in here has no other picture in :data:`VALIDATION`."""
VALIDATION = ("astronaut.png", "chelsea.png", "flower.jpg")
_OF_SKLEARN = ("china.jpg", "flower.jpg")


def find_photographs(names: tuple[str, ...]) -> list[Path]:
    """The files of :data:`TRAINING` or :data:`VALIDATION`."""
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise DataError(
            f"the photographs need {error.name}: pip install scikit-image scikit-learn"
        ) from None
    of_skimage = Path(str(skimage.data.__file__)).parent
    of_sklearn = Path(str(sklearn.datasets.__file__)).parent / "images"
    paths = [(of_sklearn if n in _OF_SKLEARN else of_skimage) / n for n in names]
    for path in paths:
        if not path.is_file():
            raise DataError(f"this version of the package does not include {path.name}")
    return paths
