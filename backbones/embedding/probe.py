"""Measure how well embeddings separate classes: kNN and a linear classifier.

Both are trained on some of the images and measured on held-out ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backbones.common.confusion import confusion_matrix
from backbones.common.errors import MendableError, required
from backbones.embedding.labels import LabelError, labels_of, split_of
from backbones.embedding.table import essence, metadata, selected, unit, vectors_in

__all__ = ["MOST_ROWS", "Method", "Mistake", "Report", "probe"]

MOST_ROWS = 100_000
"""Default limit of the rows to train on, and of those to measure on."""

Labels = Mapping[str, str] | str | Path


@dataclass(frozen=True)
class Mistake:
    """A misclassified image.

    Attributes:
        folder: of its table.
        confidence: of the prediction, 0 … 1.
    """

    key: str
    folder: str
    truth: str
    answer: str
    confidence: float


@dataclass
class Method:
    """A classifier and its results.

    Attributes:
        accuracy: share of the held-out images that were classified correctly.
        low, high: 95 % confidence interval of the accuracy (E. B. Wilson's).
        per_class: mean of the accuracies of the classes, which weights rare classes equally.
        confusion: (classes, classes); counts by true class (row) and predicted class (column).
        mistakes: most confident first.
        note: a caveat on the figures; "" if there is none.
    """

    name: str
    accuracy: float
    low: float
    high: float
    per_class: float
    confusion: np.ndarray
    mistakes: list[Mistake]
    note: str = ""


@dataclass
class Report:
    """The result of :func:`probe`.

    Attributes:
        rows: number of rows of the table, or of both tables.
        labelled: how many of them have a class.
        train, test: how many images were trained on and held out.
        classes: names, by number.
        chance: accuracy of always predicting the most frequent class of the training images.
        notes: remarks on the data for the user.
    """

    rows: int
    labelled: int
    train: int
    test: int
    classes: list[str]
    chance: float
    methods: list[Method]
    notes: list[str] = field(default_factory=list)


def probe(
    folder: str | Path,
    labels: Labels,
    test: str | Path | None = None,
    test_labels: Labels | None = None,
    split: Labels | None = None,
    held_out: float = 0.2,
    neighbors: int = 5,
    c: float = 1.0,
    most_rows: int = MOST_ROWS,
    seed: int = 0,
    source: Sequence[str | Path] = (),
) -> Report:
    """Measure the accuracy of kNN and of a linear classifier on held-out images.

    kNN takes the neighbours with the greatest cosine and weights their votes by distance. The
    linear classifier is a logistic regression on embeddings standardised to mean 0 and standard
    deviation 1.

    Args:
        labels, source: see :func:`backbones.embedding.labels.labels_of`.
        test: a second table of the same model to measure on; None to hold out part of the first.
        test_labels: classes of the second table; None to use ``labels``.
        split: which images to hold out, see :func:`backbones.embedding.labels.split_of`; None to
            choose a share of every class at random.
        held_out: that share, between 0 and 1.
        neighbors: number of neighbours that vote.
        c: inverse strength of the classifier's regularisation, above 0.
        most_rows: limit of the rows to train on and of those to measure on. Beyond it, a share of
            every class is sampled at random, which bounds time and memory.
        seed: of the random choices.

    Raises:
        MendableError: too few labels or classes, tables of different models, no scikit-learn.
    """
    for name, value, good, right in (
        ("held_out", held_out, 0 < held_out < 1, "between 0 and 1"),
        ("neighbors", neighbors, neighbors >= 1, "at least 1"),
        ("c", c, 0 < c < float("inf"), "above 0"),
        ("most_rows", most_rows, most_rows >= 2, "at least 2"),
    ):
        if not good:
            raise ValueError(f"{name} must be {right}, got {value}")
    required("sklearn", "probe", "scikit-learn")
    generator = np.random.default_rng(seed)
    seen = labels_of(folder, labels, source)
    train, held = _Side(folder, seen), _Side(folder, seen)
    if test is not None:
        if split is not None:
            raise ValueError("give either test or split")
        _require_alike(folder, test)
        held = _Side(test, labels_of(test, labels if test_labels is None else test_labels, source))
        seen = seen + held.labels
    elif split is not None:
        parts = split_of(folder, split)
        train.rows = [i for i in train.rows if parts[i] == "train"]
        held.rows = [i for i in held.rows if parts[i] == "test"]
    else:
        train.rows, held.rows = _stratified(train, held_out, generator)
    classes = sorted({str(train.labels[i]) for i in train.rows})
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    if len(classes) < 2:
        raise LabelError(f"probe needs at least two classes; {folder} has {classes}")
    number_of = {name: number for number, name in enumerate(classes)}
    notes: list[str] = []
    unknown = sorted({str(held.labels[i]) for i in held.rows} - set(classes))
    if unknown:
        held.rows = [i for i in held.rows if held.labels[i] in number_of]
        notes.append(
            f"{len(unknown)} classes without training images were left out, such as {unknown[0]}"
        )
    if not held.rows:
        raise LabelError("no image of a known class is held out for testing")
    for side, what in ((train, "train on"), (held, "test on")):
        if (count := len(side.rows)) > most_rows:
            side.rows = _fewer(side, most_rows, generator)
            notes.append(f"{len(side.rows)} of {count} images to {what} were chosen at random")
    (x, y, _), (x_test, y_test, keys) = (side.read(number_of) for side in (train, held))
    truth = _Truth(classes, y_test, keys, str(held.folder))
    methods = [_nearest(x, y, x_test, truth, neighbors), _linear(x, y, x_test, truth, c, seed)]
    chance = float((y_test == np.bincount(y).argmax()).mean())
    labelled = sum(label is not None for label in seen)
    return Report(len(seen), labelled, len(y), len(y_test), classes, chance, methods, notes)


class _Side:
    """Images to train on or to measure on: some rows of a table, at first all that have a class."""

    def __init__(self, folder: str | Path, labels: list[str | None]) -> None:
        self.folder, self.labels = folder, labels
        self.rows = [i for i, label in enumerate(labels) if label is not None]

    def by_class(self) -> list[list[int]]:
        """The rows of each class, in the alphabetical order of the classes."""
        found: dict[str, list[int]] = {}
        for i in self.rows:
            found.setdefault(str(self.labels[i]), []).append(i)
        return [found[name] for name in sorted(found)]

    def read(self, number_of: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Embeddings (n, dim), class numbers (n,) and keys, in the table's order."""
        parts, keys = [], []
        for batch in selected(self.folder, self.rows, ["key", "embedding"]):
            parts.append(vectors_in(batch))
            keys += batch.column("key").to_pylist()
        vectors = np.concatenate(parts)
        if not np.isfinite(vectors).all():
            raise LabelError(f"{self.folder} has embeddings that are NaN or infinite")
        return vectors, np.array([number_of[str(self.labels[i])] for i in sorted(self.rows)]), keys


def _require_alike(folder: str | Path, other: str | Path) -> None:
    """Raise an error for tables whose embeddings are not comparable."""
    one, two = metadata(folder), metadata(other)
    for key in ("model", "weights", "features", "preprocessing"):
        first, second = essence(key, one[key]), essence(key, two[key])
        if first != second:
            raise MendableError(
                f"{folder} and {other} cannot be compared: their {key} differ: {first}, {second}"
            )


def _stratified(
    side: _Side, held_out: float, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Training and held-out rows: a share of every class is held out, unless it has one row."""
    train: list[int] = []
    test: list[int] = []
    for numbers in side.by_class():
        count = min(max(1, round(held_out * len(numbers))), len(numbers) - 1)
        order = generator.permutation(numbers).tolist()
        test += order[:count]
        train += order[count:]
    return train, test


def _fewer(side: _Side, most: int, generator: np.random.Generator) -> list[int]:
    """Sample about ``most`` rows: the same share of every class, at least one row each."""
    chosen: list[int] = []
    for inside in side.by_class():
        count = max(1, int(len(inside) * most / len(side.rows)))
        chosen += generator.permutation(inside)[:count].tolist()
    return chosen


@dataclass
class _Truth:
    classes: list[str]
    numbers: np.ndarray
    keys: list[str]
    folder: str

    def judge(self, name: str, shares: np.ndarray, note: str) -> Method:
        """Evaluate probabilities (n, classes)."""
        from scipy.stats import binomtest

        found, sure = shares.argmax(axis=1), shares.max(axis=1)
        confusion = confusion_matrix(self.numbers, found, len(self.classes))
        right = int(np.trace(confusion))
        sizes = confusion.sum(axis=1)
        recalls = np.diag(confusion)[sizes > 0] / sizes[sizes > 0]
        wrong = np.flatnonzero(found != self.numbers)
        names, mistakes = self.classes, list[Mistake]()
        for i in wrong[np.argsort(-sure[wrong], kind="stable")].tolist():
            pair = names[self.numbers[i]], names[found[i]]
            mistakes.append(Mistake(self.keys[i], self.folder, *pair, float(sure[i])))
        low, high = binomtest(right, len(found)).proportion_ci(method="wilson")
        accuracy, per_class = right / len(found), float(recalls.mean())
        return Method(name, accuracy, low, high, per_class, confusion, mistakes, note)


def _nearest(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, truth: _Truth, k: int) -> Method:
    from sklearn.neighbors import KNeighborsClassifier

    used = min(k, len(y))
    # At unit length, the smallest distance is the greatest cosine.
    model = KNeighborsClassifier(used, weights="distance", algorithm="brute")
    shares = model.fit(unit(x), y).predict_proba(unit(x_test))
    note = f"there are only {used} training images" if used < k else ""
    return truth.judge(f"{used} nearest", shares, note)


def _linear(
    x: np.ndarray, y: np.ndarray, x_test: np.ndarray, truth: _Truth, c: float, seed: int
) -> Method:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=c, max_iter=1000, random_state=seed)
    model: Any = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        shares = model.fit(x, y).predict_proba(x_test)
    note = "its training had not converged after 1000 iterations" if said else ""
    return truth.judge("linear probe", shares, note)
