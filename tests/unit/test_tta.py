"""Test-time augmentation: the views, and the mean of their probabilities."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from animesion_training.eval.tta import decoded_size, predict


def corner_model(images):
    """Two logits: the value of the first pixel, and its negative."""
    return torch.stack([images[:, 0, 0, 0], -images[:, 0, 0, 0]], dim=1)


def test_without_views_logits_are_those_of_the_model():
    images = torch.randn(3, 3, 4, 4)
    assert torch.equal(predict(corner_model, images, 4, "none"), corner_model(images))
    assert decoded_size("none", 64, 0.9) == (64, 0.9)


def test_flip_averages_the_probabilities_of_image_and_mirror_image():
    images = torch.randn(3, 3, 4, 4)
    expected = (corner_model(images).softmax(1) + corner_model(images.flip(3)).softmax(1)) / 2
    assert torch.allclose(predict(corner_model, images, 4, "flip").exp(), expected, atol=1e-6)
    assert decoded_size("flip", 64, 0.9) == (64, 0.9)


def test_crops_are_the_corners_the_centre_and_their_mirror_images():
    images = torch.arange(36.0).reshape(1, 1, 6, 6).expand(1, 3, 6, 6)
    seen = []

    def model(view):
        assert view.shape == (1, 3, 4, 4)
        seen.append(int(view[0, 0, 0, 0]))
        return torch.zeros(1, 2)

    assert torch.allclose(predict(model, images, 4, "crops").exp(), torch.full((1, 2), 0.5))
    # first pixels of the crops at rows and columns 0, 2 and 1, and of their mirror images, 3 pixels to the right
    assert seen == [0, 3, 2, 5, 12, 15, 14, 17, 7, 10]


def test_images_for_crops_are_decoded_larger():
    assert decoded_size("crops", 224, 1.0) == (256, 1.0)
    assert decoded_size("crops", 224, 0.746) == (300, 1.0)
