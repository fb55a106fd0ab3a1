from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training.data import seeds, views

SIDES = st.integers(1, 40)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def box_by_hand(image_map: Tensor, size: tuple[int, int], threshold: float, padding: float) -> list[int]:
    """The definition, with Python's numbers: bound the mask, pad, truncate, clip; whole where nothing is attended."""
    up = functional.interpolate(image_map[None], size=size, mode="bilinear", align_corners=True)[0, 0]
    rows, columns = (up >= threshold * image_map.max()).nonzero(as_tuple=True)
    if not len(rows):
        return [0, size[0], 0, size[1]]
    box = []
    for hits, length in ((rows.tolist(), size[0]), (columns.tolist(), size[1])):
        start = max(int(min(hits) - padding * length), 0)
        box += [start, max(min(int(max(hits) + padding * length), length), start + 1)]
    return box


def crop_by_hand(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    cut = [image[None, :, y0:y1, x0:x1] for image, (y0, y1, x0, x1) in zip(images, boxes.tolist(), strict=True)]
    return torch.cat([functional.interpolate(each, size, mode="bilinear", align_corners=True) for each in cut])


def random_boxes(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    u = random(count, 4, seed=seed).double()
    y0, x0 = (u[:, 0] * height).long(), (u[:, 1] * width).long()
    y1 = y0 + 1 + (u[:, 2] * (height - y0)).long()
    x1 = x0 + 1 + (u[:, 3] * (width - x0)).long()
    return torch.stack((y0, y1.clamp(max=height), x0, x1.clamp(max=width)), 1)


# -- boxes -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 9))
def test_boxes_are_those_of_the_definition_image_by_image(
    height: int, width: int, rows: int, columns: int, threshold: float, padding: float, seed: int
) -> None:
    maps = random(3, 1, rows, columns, seed=seed) ** 3
    found = views.crop_boxes(maps, (height, width), threshold, padding)
    assert found.tolist() == [box_by_hand(each, (height, width), threshold, padding) for each in maps]


def test_each_image_has_its_own_threshold() -> None:
    ramp = torch.minimum(torch.arange(1, 8), torch.arange(7, 0, -1)).float()
    maps = (ramp[:, None] * ramp).expand(3, 1, 7, 7)
    low, middle, high = views.crop_boxes(maps, (56, 56), torch.tensor([0.1, 0.5, 0.9]), 0.0).tolist()
    assert low == views.crop_boxes(maps, (56, 56), 0.1, 0.0)[0].tolist()
    assert (low[1] - low[0]) * (low[3] - low[2]) > (middle[1] - middle[0]) * (middle[3] - middle[2])
    assert (middle[1] - middle[0]) * (middle[3] - middle[2]) > (high[1] - high[0]) * (high[3] - high[2])


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
def test_a_map_without_a_peak_crops_to_the_whole_image(value: float) -> None:
    maps = torch.full((2, 1, 4, 4), value)
    maps[1] = random(1, 4, 4)
    boxes = views.crop_boxes(maps, (16, 24), 0.5)
    assert boxes[0].tolist() == [0, 16, 0, 24]
    assert boxes[1].tolist() == views.crop_boxes(maps[1:], (16, 24), 0.5)[0].tolist()


def test_a_peak_between_the_pixels_of_a_small_image_crops_to_the_whole_image() -> None:
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 3, 3] = 1.0
    assert views.crop_boxes(maps, (2, 2), 0.5).tolist() == [[0, 2, 0, 2]]


def test_a_box_has_a_pixel_even_without_padding() -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 2, 5] = 1.0
    assert views.crop_boxes(maps, (8, 8), 1.0, 0.0).tolist() == [[2, 3, 5, 6]]
    assert views.crop_boxes(maps, (8, 8), 1.0, 0.1).tolist() == [[1, 2, 4, 5]]


def test_threshold_0_is_the_whole_image() -> None:
    assert views.crop_boxes(random(1, 1, 4, 4), (32, 32), 0.0).tolist() == [[0, 32, 0, 32]]


# -- crops -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 9))
def test_crops_equal_interpolate_image_by_image(
    height: int, width: int, out_height: int, out_width: int, seed: int
) -> None:
    images = 4 * random(4, 3, height, width, seed=seed) - 2
    boxes = random_boxes(4, height, width, seed)
    found = views.crop(images, boxes, (out_height, out_width))
    expected = crop_by_hand(images, boxes, (out_height, out_width))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_crops_of_large_images_are_as_exact() -> None:
    images, boxes = 4 * random(3, 3, 448, 448) - 2, torch.tensor([[0, 448, 0, 448], [3, 440, 17, 301], [9, 10, 0, 448]])
    torch.testing.assert_close(views.crop(images, boxes), crop_by_hand(images, boxes, (448, 448)), rtol=0, atol=1e-6)


def test_the_whole_image_is_cropped_to_itself() -> None:
    images = random(2, 3, 20, 30)
    assert torch.equal(views.crop(images, torch.tensor([[0, 20, 0, 30]] * 2)), images)


def test_one_pixel_fills_the_image() -> None:
    images = random(1, 3, 5, 5)
    found = views.crop(images, torch.tensor([[2, 3, 4, 5]]), (7, 6))
    assert torch.equal(found, images[:, :, 2:3, 4:5].expand(1, 3, 7, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_crops_and_drops_keep_type_and_memory_format(dtype: torch.dtype, layout: torch.memory_format) -> None:
    images = random(2, 3, 16, 16).to(dtype).contiguous(memory_format=layout)
    boxes = torch.tensor([[2, 12, 0, 16], [0, 5, 6, 13]])
    found = views.crop(images, boxes)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found.double(), crop_by_hand(images.double(), boxes, (16, 16)), rtol=0, atol=8e-3)
    dropped = views.drop(images, random(2, 1, 4, 4), 0.5)
    assert dropped.dtype == dtype
    assert dropped.is_contiguous(memory_format=layout)


def test_autocast_changes_nothing() -> None:
    images, attention = random(2, 3, 16, 16), random(2, 4, 4, 4)
    draws = views.draw(torch.arange(2), attention)
    expected = views.views(images, attention, draws)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(views.views(images, attention, views.draw(torch.arange(2), attention)), expected)


# -- drops -----------------------------------------------------------------------------------------------------------


def test_pixels_above_the_threshold_are_dropped_and_no_others() -> None:
    images, maps = random(3, 3, 24, 16) + 1, random(3, 1, 6, 4)
    thresholds = torch.tensor([0.3, 0.6, 1.0])
    up = functional.interpolate(maps, (24, 16), mode="bilinear", align_corners=True)
    expected = torch.where(up >= (thresholds * maps.amax((1, 2, 3)))[:, None, None, None], 0.0, images)
    found = views.drop(images, maps, thresholds)
    assert torch.equal(found, expected)
    assert all((each == 0).any() for each in found)
    assert views.drop_mask(maps, (24, 16), thresholds).dtype == torch.bool


def test_a_map_of_zeros_drops_everything_and_one_of_nan_nothing() -> None:
    images, maps = random(2, 3, 8, 8) + 1, torch.zeros(2, 1, 4, 4)
    maps[1] = torch.nan
    found = views.drop(images, maps, 0.5)
    assert not found[0].any()
    assert torch.equal(found[1], images[1])


# -- which maps ------------------------------------------------------------------------------------------------------


def test_maps_are_drawn_in_proportion_to_the_root_of_their_sum() -> None:
    attention = torch.tensor([1.0, 4.0, 0.0, 25.0])[None, :, None, None].expand(20000, 4, 1, 1)
    found = views.pick_maps(attention, random(20000, 2))
    weights = views.pick_weights(attention)[0]
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 1e-3, 5.0]) / 8.001, rtol=1e-4, atol=1e-6)
    for view in range(2):
        shares = torch.bincount(found[:, view], minlength=4) / 20000
        assert (shares - weights).abs().max() < 0.015  # four standard deviations
    together = torch.histc((4 * found[:, 0] + found[:, 1]).float(), 16, 0, 16).view(4, 4) / 20000
    assert (together - weights[:, None] * weights).abs().max() < 0.015


def test_the_smallest_and_largest_number_pick_the_first_and_last_map() -> None:
    attention = random(3, 32, 7, 7)
    ends = torch.tensor([[0.0, 1 - 2.0**-24]] * 3)
    assert views.pick_maps(attention, ends).tolist() == [[0, 31]] * 3
    assert views.pick_maps(attention, ends, num_maps=4).tolist() == [[0, 3]] * 3
    assert views.pick_maps(torch.full((1, 8, 2, 2), torch.nan), ends[:1]).max() < 8


def test_only_the_first_maps_are_drawn_where_a_number_is_given() -> None:
    assert views.pick_maps(random(500, 8, 3, 3), random(500, 2), num_maps=2).unique().tolist() == [0, 1]


def test_minus_1_stands_for_the_mean_map() -> None:
    attention = random(2, 5, 3, 3)
    crops, drops = views.select_maps(attention, torch.tensor([[4, -1], [-1, 0]]))
    assert torch.equal(crops[0, 0], attention[0, 4])
    assert torch.equal(drops[1, 0], attention[1, 0])
    torch.testing.assert_close(drops[0, 0], attention[0].mean(0))
    torch.testing.assert_close(crops[1:], views.mean_map(attention)[1:])


def test_class_maps_average_to_the_logit_without_bias() -> None:
    features, classifier = random(3, 6, 4, 4), torch.nn.Linear(6, 5, bias=False)
    classes = torch.tensor([4, 0, 2])
    logits = classifier(features.mean((2, 3)))
    maps = views.class_map(features, classifier.weight, classes)
    assert maps.shape == (3, 1, 4, 4)
    torch.testing.assert_close(maps.mean((1, 2, 3)), logits.gather(1, classes[:, None])[:, 0])


# -- draws and views -------------------------------------------------------------------------------------------------


def test_a_sample_has_the_same_draws_in_any_batch() -> None:
    attention = random(9, 32, 7, 7)
    keys = torch.from_numpy(seeds.hashes(0, seeds.AUGMENT, 3, torch.arange(9).numpy()).view("int64"))
    together = views.draw(keys, attention)
    shuffled = torch.tensor([4, 8, 0, 2])
    apart = views.draw(keys[shuffled], attention[shuffled])
    for whole, part in zip(together, apart, strict=True):
        assert torch.equal(whole[shuffled], part)


def test_thresholds_fill_their_ranges_and_do_not_follow_the_maps() -> None:
    attention = random(1, 8, 2, 2).expand(4000, 8, 2, 2)
    draws = views.draw(torch.arange(4000), attention, crop=(0.4, 0.6), drop=(0.2, 0.5))
    for values, low, high in ((draws.crop_threshold, 0.4, 0.6), (draws.drop_threshold, 0.2, 0.5)):
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.01
    numbers = torch.cat((draws.maps.float(), draws.crop_threshold[:, None], draws.drop_threshold[:, None]), 1)
    assert (torch.corrcoef(numbers.T) - torch.eye(4)).abs().max() < 0.07


def test_without_sampling_the_mean_map_makes_both_views() -> None:
    attention, images = random(3, 6, 4, 4), random(3, 3, 16, 16)
    draws = views.draw(torch.arange(3), attention, sample_maps=False)
    assert draws.maps.tolist() == [[-1, -1]] * 3
    mean = attention.mean(1, keepdim=True)
    crops = views.crop(images, views.crop_boxes(mean, (16, 16), draws.crop_threshold))
    expected = torch.cat((crops, views.drop(images, mean, draws.drop_threshold)))
    torch.testing.assert_close(views.views(images, attention, draws), expected)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_views_are_the_crops_and_then_the_drops(batch: int) -> None:
    attention, images = random(batch, 6, 4, 4), random(batch, 3, 16, 20)
    draws = views.draw(torch.arange(batch), attention)
    made = views.views(images, attention, draws, padding=0.05)
    assert made.shape == (2 * batch, 3, 16, 20)
    for i in range(batch):
        crop_map, drop_map = (attention[i, m][None, None] for m in draws.maps[i].tolist())
        box = views.crop_boxes(crop_map, (16, 20), float(draws.crop_threshold[i]), 0.05)
        torch.testing.assert_close(made[i : i + 1], crop_by_hand(images[i : i + 1], box, (16, 20)), rtol=0, atol=1e-6)
        dropped = views.drop(images[i : i + 1], drop_map, float(draws.drop_threshold[i]))
        assert torch.equal(made[batch + i : batch + i + 1], dropped)


def test_views_carry_no_gradient_to_the_attention() -> None:
    attention = random(2, 4, 3, 3).requires_grad_()
    made = views.views(random(2, 3, 8, 8), attention, views.draw(torch.arange(2), attention))
    assert not made.requires_grad


def test_attention_that_is_not_finite_is_refused_in_a_sentence() -> None:
    attention = random(4, 2, 3, 3)
    views.check_finite(attention)
    attention[1, 0, 2, 2] = torch.nan
    attention[3, 1, 0, 0] = torch.inf
    with pytest.raises(UsageError, match="not finite for 2 of 4 images"):
        views.check_finite(attention)


def test_impossible_options_are_named() -> None:
    attention = random(2, 4, 3, 3)
    with pytest.raises(UsageError, match="num_maps must be from 1 to 4"):
        views.draw(torch.arange(2), attention, num_maps=5)
    with pytest.raises(UsageError, match=r"crop\[1\]"):
        views.draw(torch.arange(2), attention, crop=(0.6, 0.4))
    with pytest.raises(UsageError, match=r"drop\[0\]"):
        views.draw(torch.arange(2), attention, drop=(-0.1, 0.4))
    with pytest.raises(UsageError, match="padding"):
        views.crop_boxes(attention[:, :1], (8, 8), 0.5, -0.1)


def test_misshapen_input_is_refused() -> None:
    attention, images = random(2, 4, 3, 3), random(2, 3, 8, 8)
    with pytest.raises(ValueError, match="seeds must be int64"):
        views.draw(torch.arange(2.0), attention)
    with pytest.raises(ValueError, match="maps must be floating"):
        views.crop_boxes(attention, (8, 8), 0.5)
    with pytest.raises(ValueError, match="thresholds must be"):
        views.drop(images, attention[:, :1], torch.tensor([0.5]))
    with pytest.raises(ValueError, match="images must be floating"):
        views.crop(images.to(torch.uint8), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="boxes must be int64"):
        views.crop(images, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="images must be floating"):
        views.drop(images[:1], attention[:, :1], 0.5)
