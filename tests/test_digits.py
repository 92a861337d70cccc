from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from dltrain.data.digits import DIGITS, digits
from dltrain.data.files import Files


def test_digits_are_those_of_scikit_learn_scaled_to_bytes(tmp_path):
    dataset = digits(Files(tmp_path / "absent", download=False))
    source = load_digits()
    every_fifth = slice(4, None, 5)
    assert np.array_equal(dataset.test.labels.numpy(), source.target[every_fifth])
    assert np.array_equal(dataset.train.labels.numpy(), np.delete(source.target, np.arange(1797)[every_fifth]))
    expected = [[[round(value * 255 / 16) for value in row] for row in image] for image in source.images[every_fifth]]
    assert np.array_equal(dataset.test.images.numpy(), np.array(expected)[:, None])
    assert (len(dataset.train), len(dataset.test)) == (DIGITS.train, DIGITS.test) == (1438, 359)
    assert (int(dataset.train.images.min()), int(dataset.train.images.max())) == (0, 255)
    assert dataset.classes == tuple("0123456789")
    assert dataset.verified
    assert not (tmp_path / "absent").exists()
