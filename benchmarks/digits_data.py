"""scikit-learn's digits as documents, and the judges of what a model draws.

1,797 grey images of 8x8 with values 0 .. 16, split into 1,437 to learn from and 360 held out (stratified, seed 0). A model
sees them as uint8 RGB with three equal channels, value * 255 / 16. The judges work on greys [n, 64] in 0 .. 16:

    class accuracy     of a support vector classifier fitted to the training images (98.9% right on the held-out ones)
    Frechet distance   (1) |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

between means m and covariances C of two sets of pixels, scaled to [0, 1]; no features are involved.
"""

import dataclasses

import numpy as np

from mmdiff import Document, Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PER_CLASS = 20
LABELS = np.repeat(np.arange(10), PER_CLASS)  # what the judged sets show
SIDE, LEVELS = 8, 16


@dataclasses.dataclass(frozen=True)
class Digits:
    train: np.ndarray  # float64 [1437, 64], 0 .. 16
    train_labels: np.ndarray
    held_out: np.ndarray  # float64 [360, 64]
    held_out_labels: np.ndarray


def load() -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    greys, labels = load_digits(return_X_y=True)
    train, held_out, train_labels, held_out_labels = train_test_split(
        greys, labels, test_size=0.2, random_state=0, stratify=labels
    )
    return Digits(train, train_labels, held_out, held_out_labels)


def documents(greys: np.ndarray, labels: np.ndarray) -> list[Document]:
    """[name, image] of each digit."""
    return [Document(NAMES[label], Image(to_pixels(grey))) for grey, label in zip(greys, labels, strict=True)]


def to_pixels(grey: np.ndarray) -> np.ndarray:
    """[64] in 0 .. 16 to uint8 [8, 8, 3]."""
    value = np.rint(grey.reshape(SIDE, SIDE) * 255 / LEVELS).astype(np.uint8)
    return np.repeat(value[..., None], 3, axis=-1)


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [8, 8, 3] to [64] in 0 .. 16, the mean of the channels; not rounded."""
    return pixels.mean(axis=-1).reshape(-1) / 255 * LEVELS


class Judge:
    """Scores sets of drawn digits against the held-out ones."""

    def __init__(self, digits: Digits):
        from sklearn.svm import SVC

        self.digits = digits
        self.classifier = SVC(gamma=0.001).fit(digits.train, digits.train_labels)

    def score(self, greys: np.ndarray) -> dict[str, float]:
        """Class accuracy and Frechet distance of [200, 64] showing LABELS."""
        right = self.classifier.predict(greys) == LABELS
        return {"class_accuracy": float(right.mean()), "frechet_distance": frechet(greys, self.digits.held_out)}

    def anchors(self) -> dict[str, float]:
        """What perfect generation would score: 20 training images per class; and how good the classifier is."""
        random = np.random.default_rng(0)
        members = [np.flatnonzero(self.digits.train_labels == label) for label in range(10)]
        real = np.concatenate([self.digits.train[random.choice(m, PER_CLASS, replace=False)] for m in members])
        return {
            "real_images_frechet_distance": frechet(real, self.digits.held_out),
            "classifier_accuracy": float(self.classifier.score(self.digits.held_out, self.digits.held_out_labels)),
        }


def caption_accuracy(captions: list[str], labels: np.ndarray) -> float:
    """Share of captions that are exactly the digit's name."""
    return float(np.mean([caption == NAMES[label] for caption, label in zip(captions, labels, strict=True)]))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Equation (1) for greys [n, 64] in 0 .. 16."""
    a, b = a / LEVELS, b / LEVELS
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the trace of the root of C_a C_b is that of the root of C_a^(1/2) C_b C_a^(1/2), which is symmetric
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    mixed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.trace(cov_a + cov_b) - 2 * mixed)


def sheet(greys: np.ndarray, rows: int, zoom: int = 6) -> np.ndarray:
    """A picture of the first `rows` digits of each class, one class per column: uint8 [h, w, 3]."""
    digits = greys.reshape(10, PER_CLASS, SIDE, SIDE)[:, :rows] / LEVELS * 255
    framed = np.pad(digits, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=96)
    picture = framed.transpose(1, 2, 0, 3).reshape(rows * (SIDE + 1), 10 * (SIDE + 1))
    return np.repeat(np.kron(picture, np.ones((zoom, zoom)))[..., None], 3, axis=-1).astype(np.uint8)
