"""PaDiM: Gaussians against brute force, one pass against stacked features, and defects on drawn textures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import BACKBONE, generator, relative_error, texture, textures, tiny_extractor
from torchmetrics.functional.classification import binary_auroc

from diffad import GaussianFeatureModel
from diffad.images import images_to_pixel_values, images_to_tensors
from diffad.moments import FeatureMoments

SIZE = 16


def model(fitted: bool = True, **config) -> GaussianFeatureModel:
    """8 of 64 channels at 8 x 8 positions, over a tiny backbone of random weights."""
    config = {"num_channels": 8, "feature_size": 8, "image_size": SIZE, "sigma": 1.0, **config}
    new = GaussianFeatureModel.from_extractor(tiny_extractor(), **config)
    return new.fit([pixels(40)]) if fitted else new


def pixels(count: int = 4, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=generator(seed)) * 2.0 - 1.0


def drawn(count: int, first_seed: int = 0, size: int = 32, defect: bool = False) -> torch.Tensor:
    images = [texture(first_seed + i, size, defect) for i in range(count)]
    return images_to_pixel_values(images_to_tensors(images), (size, size))


# -- the Gaussians -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 5])  # more images than channels, and fewer
def test_distances_equal_numpys(count):
    gaussian = model(fitted=False, epsilon=0.05).fit([pixels(count)])
    stacked = gaussian.features(pixels(count)).double().numpy()  # (N, C, P)
    new = gaussian.features(pixels(3, seed=1)).double().numpy()
    regularization = 0.05 * stacked.var(axis=0, ddof=1).mean() * np.eye(8)
    expected = np.empty((3, 64))
    for p in range(64):
        covariance = np.cov(stacked[:, :, p].T) + regularization
        difference = new[:, :, p] - stacked[:, :, p].mean(axis=0)
        expected[:, p] = np.einsum("nc,cd,nd->n", difference, np.linalg.inv(covariance), difference)
    distance = gaussian.squared_distance(pixels(3, seed=1))
    assert distance.shape == (3, 8, 8)
    assert distance.dtype == torch.float32
    np.testing.assert_allclose(distance.flatten(1), expected, rtol=1e-3)


def test_good_images_are_as_far_as_there_are_channels():
    gaussian = model(epsilon=1e-6)
    fitted = gaussian.squared_distance(pixels(40)).mean()
    assert float(fitted) == pytest.approx(8 * 39 / 40, rel=1e-2)  # exactly, over the images of the fit


def test_one_pass_over_batches_equals_stacked_images():
    whole = model(fitted=False).fit([pixels(40)])
    parts = model(fitted=False).fit(iter(pixels(40).split([1, 7, 20, 12])))
    assert int(parts.num_images[0]) == int(whole.num_images[0]) == 40
    assert relative_error(parts.mean, whole.mean) < 1e-6
    assert relative_error(parts.whitening, whole.whitening) < 1e-5


def test_a_large_mean_costs_no_precision():
    features = torch.randn(200, 5, 3, generator=generator()) + 1e3
    moments = FeatureMoments(3, 5)
    for part in features.split(32):
        moments.update(part)
    expected = np.stack([np.cov(features[:, :, p].double().numpy().T) for p in range(3)])
    np.testing.assert_allclose(moments.covariance(), expected, atol=1e-7)
    np.testing.assert_allclose(moments.variance(), expected.diagonal(axis1=1, axis2=2), atol=1e-7)


def test_whitening_is_of_the_inverse_covariance():
    gaussian = model()
    moments = FeatureMoments(64, 8)
    moments.update(gaussian.features(pixels(40)))
    covariance = moments.covariance() + 0.01 * moments.variance().mean() * torch.eye(8)
    whitening = gaussian.whitening[0].double()
    assert torch.equal(whitening, whitening.tril())
    torch.testing.assert_close(
        whitening @ covariance @ whitening.mT, torch.eye(8).double().expand(64, 8, 8), atol=1e-3, rtol=0
    )


def test_channels_are_drawn_once_and_for_all():
    drawn_channels = model(fitted=False).channels
    assert torch.equal(drawn_channels, model(fitted=False).channels)
    assert not torch.equal(drawn_channels, model(fitted=False, seed=1).channels)
    assert len(set(drawn_channels.tolist())) == 8
    assert drawn_channels.tolist() == sorted(drawn_channels.tolist())
    assert model(fitted=False, num_channels=1000).channels.tolist() == list(range(64))
    assert model(fitted=False, num_channels=None).channels.tolist() == list(range(64))


def test_the_grid_is_that_of_the_finest_stride():
    gaussian = GaussianFeatureModel(BACKBONE, (4, 8), image_size=32)
    assert gaussian.config.feature_size == 8
    assert gaussian.mean.shape[1] == 64


def test_constant_images_can_be_fitted():
    gaussian = model(fitted=False).fit([torch.zeros(4, 3, SIZE, SIZE)])
    assert float(gaussian.squared_distance(torch.zeros(1, 3, SIZE, SIZE)).max()) < 1e-3
    assert gaussian.squared_distance(pixels()).isfinite().all()


# -- gradient ----------------------------------------------------------------------------------------------------


def test_gradient_equals_finite_differences():
    gaussian, images = model(epsilon=0.1), pixels(2, seed=1)
    gradient = gaussian.energy_gradient(images)
    assert gradient.shape == images.shape
    assert gradient.dtype == torch.float32

    def energy(images: torch.Tensor) -> torch.Tensor:
        return 0.5 * gaussian.squared_distance(images).double().sum(dim=(1, 2))  # (N,)

    for direction in (gradient, gradient * (pixels(2, seed=2) > 0.0), gradient.roll(1, dims=3) + gradient):
        step = 2e-3 * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        difference = (energy(images + step) - energy(images - step)) / 2.0
        expected = (gradient * step).sum(dim=(1, 2, 3)).double()
        largest = float(2e-3 * gradient.flatten(1).norm(dim=1).min())
        torch.testing.assert_close(difference, expected, rtol=0.0, atol=2e-2 * largest)
        assert float(expected.min()) > 0.2 * largest  # the direction says something


def test_gradient_of_an_image_is_its_own():
    gaussian, images = model(), pixels(3, seed=1)
    together = gaussian.energy_gradient(images)
    torch.testing.assert_close(together[1:2], gaussian.energy_gradient(images[1:2]), rtol=1e-4, atol=1e-3)


def test_gradient_is_there_without_grad_mode_and_leaves_nothing_behind():
    gaussian, images = model(), pixels(1, seed=1)
    with torch.no_grad():
        gradient = gaussian.energy_gradient(images)
    assert not gradient.requires_grad
    assert not images.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in gaussian.parameters())


def test_descending_it_makes_an_image_more_normal():
    gaussian = model(fitted=False, epsilon=0.1).fit([drawn(60, size=SIZE)])
    defective = drawn(4, 100, SIZE, defect=True)
    sample = defective
    for _ in range(30):
        gradient = gaussian.energy_gradient(sample)
        sample = sample - 0.01 * gradient / gradient.std(dim=(1, 2, 3), keepdim=True)
    assert (gaussian(sample).anomaly_score < 0.8 * gaussian(defective).anomaly_score).all()


# -- maps and scores ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_textures() -> GaussianFeatureModel:
    gaussian = GaussianFeatureModel.from_extractor(
        tiny_extractor(), num_channels=24, image_size=32, feature_size=16, sigma=1.0
    )
    return gaussian.fit(drawn(80).split(16))


def test_painted_squares_are_found(of_textures):
    good = of_textures(drawn(24, 200))
    images = drawn(24, 300, defect=True)
    bad = of_textures(images)
    scores = torch.cat([good.anomaly_score, bad.anomaly_score])
    assert float(binary_auroc(scores, torch.arange(48) // 24)) > 0.98
    # the highest point lies on the square, or as far from it as the features look
    squares = torch.nn.functional.max_pool2d((images == -1.0).all(dim=1, keepdim=True).float(), 9, 1, 4)
    highest = bad.anomaly_map.flatten(1).argmax(dim=1, keepdim=True)
    assert float(squares.flatten(1).gather(1, highest).mean()) > 0.95
    assert float(squares.mean()) < 0.5


def test_map_and_score_of_one_call(of_textures):
    images = drawn(3, 300, size=40, defect=True)
    output = of_textures(images)
    assert output.anomaly_map.shape == (3, 40, 40)
    assert (output.anomaly_map >= 0.0).all()
    maps = of_textures.mahalanobis_map(images)
    assert maps.shape == (3, 32, 32)
    assert torch.equal(output.anomaly_score, maps.amax(dim=(1, 2)))


def test_detect_takes_images_as_users_have_them(of_textures):
    images = textures(5, (20, 28), first_seed=300)
    output = of_textures.detect(images)
    assert output.anomaly_map.shape == (5, 20, 28)
    assert output.anomaly_score.shape == (5,)
    torch.testing.assert_close(of_textures.detect(images, batch_size=2).anomaly_map, output.anomaly_map)
    of_array = of_textures.detect(np.stack(images))
    torch.testing.assert_close(of_array.anomaly_score, output.anomaly_score)
    sizes = [texture(0, 9), texture(1, 20)]
    assert of_textures.detect(sizes, match_input_resolution=False).anomaly_map.shape == (2, 32, 32)
    with pytest.raises(ValueError, match=r"`image` holds images of different sizes.*match_input_resolution=False"):
        of_textures.detect(sizes)
    with pytest.raises(ValueError, match="`batch_size`"):
        of_textures.detect(images, batch_size=0)


# -- categories --------------------------------------------------------------------------------------------------


def test_each_category_has_its_own_gaussians():
    both = model(fitted=False, num_categories=2)
    both.fit([pixels(40, seed=3)], category=0)
    with pytest.raises(ValueError, match="Category 1 is not fitted yet"):
        both.squared_distance(pixels(), category=1)
    both.fit([drawn(40, size=SIZE)], category=1)
    alone = [model(fitted=False).fit([pixels(40, seed=3)]), model(fitted=False).fit([drawn(40, size=SIZE)])]
    mixed = both.squared_distance(pixels(3, seed=5), category=torch.tensor([1, 0, 1]))
    for i, category in enumerate((1, 0, 1)):
        expected = alone[category].squared_distance(pixels(3, seed=5)[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        both.energy_gradient(pixels(3, seed=5), torch.tensor([1, 0, 1]))[1:2],
        alone[0].energy_gradient(pixels(3, seed=5)[1:2]),
        rtol=1e-3,
        atol=1e-2,
    )
    with pytest.raises(ValueError, match="`category` is needed"):
        both.squared_distance(pixels())
    with pytest.raises(ValueError, match=r"`category` must lie in \[0, 1\], but holds 2"):
        both.squared_distance(pixels(), category=2)


@pytest.mark.parametrize("images", [0, 1])
def test_too_few_images_are_refused(images):
    with pytest.raises(ValueError, match=f"`batches` holds {images} images"):
        model(fitted=False).fit([pixels(images)] if images else [])


def test_an_unfitted_model_says_so():
    with pytest.raises(ValueError, match=r"not fitted yet\. Call `fit`"):
        model(fitted=False)(pixels())


@pytest.mark.parametrize(
    ("config", "words"), [({"epsilon": 0.0}, "`epsilon` must be positive"), ({"num_channels": 0}, "`num_channels`")]
)
def test_wrong_configurations_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        model(fitted=False, **config)


# -- saving and precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_and_loaded_alone(tmp_path, dtype):
    gaussian = model()
    gaussian.save_pretrained(tmp_path)
    loaded = GaussianFeatureModel.from_pretrained(tmp_path, dtype=dtype)
    expected, actual = gaussian(pixels(seed=1)), loaded(pixels(seed=1))
    assert torch.equal(actual.anomaly_map, expected.anomaly_map)
    assert torch.equal(actual.anomaly_score, expected.anomaly_score)
    assert torch.equal(loaded.channels, gaussian.channels)
    assert int(loaded.num_images[0]) == 40
    assert not any(p.requires_grad for p in loaded.parameters())


def test_it_stays_in_float32():
    gaussian = model()
    expected = gaussian(pixels(seed=1)).anomaly_map
    gaussian.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gaussian(pixels(seed=1)).anomaly_map, expected)
        assert gaussian.energy_gradient(pixels(seed=1)).dtype == torch.float32
    half = gaussian(pixels(seed=1).bfloat16()).anomaly_map
    assert half.dtype == torch.float32
    assert relative_error(half, expected) < 0.2  # of the images' own rounding


def test_it_can_be_fitted_again():
    gaussian = model().fit([drawn(40, size=SIZE)])
    assert torch.equal(gaussian.whitening, model(fitted=False).fit([drawn(40, size=SIZE)]).whitening)


def test_the_extractors_standardisation_comes_along():
    extractor = tiny_extractor().fit_standardization([pixels(8)], (8, 8))
    gaussian = GaussianFeatureModel.from_extractor(extractor, image_size=SIZE, feature_size=8, num_channels=None)
    torch.testing.assert_close(gaussian.features(pixels()), extractor(pixels(), (8, 8)).flatten(2))
    extractor.channel_std.mul_(2.0)  # a copy, which the extractor's owner does not change
    assert relative_error(gaussian.features(pixels()), extractor(pixels(), (8, 8)).flatten(2)) > 0.5


def test_of_several_image_sizes_the_largest_is_taken():
    extractor = tiny_extractor(image_size=[12, SIZE]).fit_standardization([pixels(8)], (8, 8))
    gaussian = GaussianFeatureModel.from_extractor(extractor, feature_size=8, num_channels=None)
    assert gaussian.config.image_size == SIZE
    width = extractor.num_channels // 2
    torch.testing.assert_close(gaussian.features(pixels()), extractor(pixels(), (8, 8))[:, width:].flatten(2))
