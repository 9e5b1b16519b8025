"""The patches that are kept of good images, and distances from them."""

from __future__ import annotations

import pytest
import torch
from conftest import generator, texture, textures, tiny_extractor, tiny_pipeline

from diffad import AnomalyDenoisePipeline
from diffad.calibration.coreset import (
    CORESET_SIZE,
    greedy_coreset,
    locally_aware_patches,
    nearest_distances,
    num_directions,
    patch_layers,
    principal_directions,
    project,
    sample_patches,
)


def test_patches_are_of_strides_from_eight_on():
    assert patch_layers([2, 4, 8, 16]) == [2, 3]
    assert patch_layers([2, 4]) == [1]
    assert patch_layers([14, 14]) == [0, 1]
    assert patch_layers([8, 16, 8, 16]) == [0, 1, 2, 3]  # the same strides of images of two sizes


def test_a_patch_is_an_average_over_its_surroundings():
    layers = [torch.randn(2, 3, 8, 8, generator=generator()), torch.randn(2, 5, 4, 4, generator=generator(1))]
    patches = locally_aware_patches(layers)
    assert patches.shape == (2, 8, 8, 8)
    torch.testing.assert_close(patches[:, :3, 4, 4], layers[0][:, :, 3:6, 3:6].mean(dim=(2, 3)))


def test_distances_are_those_of_the_nearest():
    patches, coreset = torch.randn(3, 6, 4, 5, generator=generator()), torch.randn(11, 6, generator=generator(1))
    expected = torch.cdist(patches.flatten(2).mT, coreset).amin(dim=2).view(3, 4, 5)
    torch.testing.assert_close(nearest_distances(patches, coreset), expected, rtol=1e-4, atol=1e-4)
    assert nearest_distances(patches[:0], coreset).shape == (0, 4, 5)


def test_an_image_is_no_neighbour_of_its_own():
    patches = torch.randn(2, 6, 3, 3, generator=generator())
    coreset = patches.flatten(2).mT.flatten(0, 1)  # all of both
    owner, image = torch.tensor([0] * 9 + [1] * 9), torch.tensor([0, 1])
    assert nearest_distances(patches, coreset).max() < 1e-2
    expected = [nearest_distances(patches[:1], coreset[9:]), nearest_distances(patches[1:], coreset[:9])]
    torch.testing.assert_close(nearest_distances(patches, coreset, owner, image), torch.cat(expected))


def test_a_coreset_is_near_everything():
    """Three far groups, one of a single patch: three patches keep all of them."""
    centers = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    groups = [centers[i] + torch.randn(n, 2, generator=generator(i)) for i, n in enumerate((200, 200, 1))]
    patches = torch.cat(groups)
    chosen = patches[greedy_coreset(patches, 3)]
    assert torch.cdist(patches, chosen).amin(dim=1).max() < 10.0
    assert len(set(greedy_coreset(patches, 300).tolist())) == 300
    assert greedy_coreset(patches[:2], 5).tolist()[2:] == [0, 0, 0]  # fewer than asked for: repeated


def test_a_coreset_of_several_chosen_at_once_is_near_everything():
    patches = torch.rand(9001, 3, generator=generator())
    chosen = greedy_coreset(patches, CORESET_SIZE)
    assert len(set(chosen.tolist())) == CORESET_SIZE
    farthest, at_random = (
        torch.cdist(patches, patches[one]).amin(dim=1).max() for one in (chosen, range(CORESET_SIZE))
    )
    assert farthest < 0.6 * at_random


@pytest.mark.parametrize("varies", ["the last images", "two columns of each"])
def test_patches_are_kept_where_they_vary_however_few_these_are(varies):
    varied = torch.zeros(16, 32, 32, dtype=torch.bool)  # images, rows, columns
    (varied[14:] if varies == "the last images" else varied[..., 20:22]).fill_(True)
    width = torch.where(varied.flatten(), 1.0, 0.01)
    patches = torch.rand(len(width), 3, generator=generator()) * width[:, None]
    chosen = greedy_coreset(patches, CORESET_SIZE)
    there = patches[varied.flatten()]
    assert torch.cdist(there, patches[chosen]).amin(dim=1).max() < 0.02


def test_directions_in_which_nothing_varies_tell_nothing():
    """Patches of 100 channels that lie in a plane through some point of theirs."""
    plane = torch.randn(2, 100, generator=generator())
    patches = (torch.randn(500, 2, generator=generator(1)) @ plane + 3.0).mT[None, :, None]  # (1, 100, 1, 500)
    directions = principal_directions(patches[0, :, 0].mT, 2)
    torch.testing.assert_close(directions.mT @ directions, torch.eye(2), atol=1e-5, rtol=0.0)
    coreset, patches = patches[0, :, 0, :20].mT, patches[..., 20:]
    expected = nearest_distances(patches, coreset)
    found = nearest_distances(project(patches, directions), coreset @ directions)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)
    assert (num_directions(40), num_directions(100), num_directions(152)) == (40, 64, 76)


def test_which_patches_are_sampled_depends_on_the_image_alone():
    patches = torch.arange(60.0).view(2, 5, 6)
    torch.testing.assert_close(sample_patches(patches, 3, 4), sample_patches(patches, 3, 4))
    assert not torch.equal(sample_patches(patches, 3, 4), sample_patches(patches, 4, 4))
    assert sample_patches(patches, 0, 100).shape == (30, 2)


@pytest.fixture(scope="module", params=[(2, 4), (4, 8, 16)])  # whose patches have 32 and 240 channels
def nearest(request) -> AnomalyDenoisePipeline:
    extractor = tiny_extractor(request.param, image_size=64 if 16 in request.param else 32)
    pipeline = AnomalyDenoisePipeline(None, None, extractor, position_trust=0.0, weights={"nearest": 1.0})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.calibrate(textures(20, 32, 100), textures(30, 32), false_alarm_rate=0.2)


def test_the_nearest_patch_finds_a_defect(nearest):
    output = nearest([texture(500, 32, defect=True), texture(501, 32)])
    assert output.anomaly_score[0] > output.anomaly_score[1]
    assert output.is_anomalous[0]


def test_without_a_calibration_there_is_no_nearest_patch():
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32), weights={"nearest": 1.0})
    with pytest.raises(ValueError, match="`weights`: the nearest good patches alone give a map after `calibrate` only"):
        pipeline(texture(0, 32))


def test_it_is_saved_to_the_bit(nearest, tmp_path):
    nearest.save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path)
    images = textures(3, 32, first_seed=600)
    assert (loaded(images).anomaly_map == nearest(images).anomaly_map).all()
    assert loaded.weights == {"kl": 0.0, "feature_error": 0.0, "gaussian": 0.0, "nearest": 1.0}


def test_new_good_images_score_as_those_of_the_statistics(nearest):
    """Each of these is measured by the others' patches: the map's mean over new images is theirs, in deviations."""
    maps = nearest(textures(40, 32, first_seed=800)).anomaly_map
    assert abs(maps.mean()) < 0.3
    assert 0.7 < maps.std() < 1.3


@pytest.mark.parametrize("count", [3, 5, 10])
def test_few_images_left_out_in_turn_look_like_new_ones(count):
    """Far fewer images than channels: what each is without itself is a small difference of large numbers."""
    pipeline = AnomalyDenoisePipeline(
        None, None, tiny_extractor(image_size=32), position_trust=0.0, weights={"gaussian": 3.0, "nearest": 1.0}
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.calibrate(textures(count, 32), false_alarm_rate=0.3, leave_one_out=True)
    good = pipeline(textures(8, 32, first_seed=300)).anomaly_score
    bad = pipeline([texture(400 + i, 32, defect=True) for i in range(4)]).anomaly_score
    assert bad.min() > float(pipeline.calibration.image_threshold[0])
    assert good.max() < bad.min()
    assert good.min() > -5.0  # in deviations of the images left out


def test_equal_images_are_enough():
    pipeline = AnomalyDenoisePipeline(
        None, None, tiny_extractor(image_size=32), position_trust=0.0, weights={"gaussian": 3.0, "nearest": 1.0}
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.calibrate([texture(0, 32)] * 12, false_alarm_rate=0.3, leave_one_out=True)
    output = pipeline([texture(0, 32), texture(400, 32, defect=True)])
    assert output.anomaly_score[0] < output.anomaly_score[1]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_denoiser_s_maps_count_where_one_or_two_images_say_nothing_of_the_features(count):
    weights = {"kl": 0.5, "feature_error": 0.25, "gaussian": 0.125, "nearest": 0.125}
    pipeline = tiny_pipeline(weights=weights, timesteps=[100], image_size=32)
    pipeline.calibrate(textures(count, 32), false_alarm_rate=0.3)
    assert torch.isfinite(pipeline.calibration.image_threshold).all()
    assert pipeline(texture(500, 32, defect=True)).anomaly_score[0] > pipeline(texture(501, 32)).anomaly_score[0]


def test_one_image_s_maps_are_finite_at_any_size():
    pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=32), weights={"gaussian": 3, "nearest": 1})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.calibrate(textures(1, 32), leave_one_out=True)
    assert torch.isfinite(torch.from_numpy(pipeline(texture(2, 32), processing_resolution=24).anomaly_map)).all()


def test_other_weights_than_the_calibration_s_are_an_error(nearest, tmp_path):
    nearest.save_pretrained(tmp_path)
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path, weights={"gaussian": 1.0})
    with pytest.raises(ValueError, match=r"`calibration` was made for other scores .*weights"):
        loaded(texture(0, 32))
