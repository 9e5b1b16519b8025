"""Images of more than 8 bits: no grey level is lost on the way to the networks, and the range is the training set's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import generator, texture, tiny_pipeline, write_folder
from PIL import Image

from diffad import AnomalyDenoisePipeline
from diffad.data import load_anomaly_dataset
from diffad.images import ImageSequence, find_value_range, image_to_rgb, images_to_tensors, read_image
from diffad.pipelines.pipeline_gradient_denoising import GradientDenoisingPipeline
from diffad.predict import predict_files
from diffad.reading.grey_depth import smallest_range
from diffad.training.data import ResizedImages, load_good_images
from diffad.training.train_ddpm import parse_args

LEVELS = 500


@pytest.fixture
def pipeline() -> AnomalyDenoisePipeline:
    return tiny_pipeline()


def write_deep(path, bits: int = 12, size: int = 32, kind: str = "I;16") -> None:
    """A ramp of many grey levels in the middle of a range of `bits`; the largest value is more than half of it."""
    top = 2**bits - 1
    values = np.linspace(top * 0.4, top * 0.6, size * size).round().reshape(size, size)
    Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[kind])).save(path)


@pytest.mark.parametrize(
    ("largest", "end"), [(0, 255), (255, 255), (256, 1023), (1024, 4095), (4095, 4095), (4096, 16383), (16384, 65535)]
)
def test_the_smallest_range_that_holds_a_value(largest, end):
    assert smallest_range(largest) == end
    assert smallest_range(0.7, floating=True) == 1.0
    assert smallest_range(1.002, floating=True) == 1.0  # as resizing overshoots
    assert smallest_range(2.0, floating=True) == 255.0


@pytest.mark.parametrize(("name", "kind"), [("a.png", "I;16"), ("a.tif", "I;16"), ("a.tif", "I"), ("a.tif", "F")])
def test_every_grey_level_reaches_the_networks(tmp_path, name, kind):
    write_deep(tmp_path / name, kind=kind)
    stored = np.asarray(Image.open(tmp_path / name)).astype(np.float64)
    assert len(np.unique(stored)) > LEVELS
    for image in (tmp_path / name, Image.open(tmp_path / name)):
        tensor = images_to_tensors(image)[0]
        np.testing.assert_allclose(tensor[0].numpy(), stored / 4095, rtol=1e-6)
        assert len(tensor[0].unique()) == len(np.unique(stored))
        (resized,) = ImageSequence([image]).resized((32, 32))
        assert torch.equal(resized[0], tensor)
    assert image_to_rgb(read_image(tmp_path / name)).mode == "RGB"


def test_arrays_of_16_bits_are_taken_as_files_of_16_bits(tmp_path):
    write_deep(tmp_path / "a.png")
    array = np.asarray(Image.open(tmp_path / "a.png"))
    expected = images_to_tensors(tmp_path / "a.png")[0]
    assert torch.equal(images_to_tensors(array)[0], expected)
    assert torch.equal(images_to_tensors(torch.from_numpy(array.copy()))[0], expected)


def test_one_range_holds_all_images_of_a_call(tmp_path):
    write_deep(tmp_path / "dark.png", bits=10)
    write_deep(tmp_path / "bright.png", bits=14)
    Image.fromarray(texture(0, 32)).save(tmp_path / "eight.png")
    paths = [tmp_path / name for name in ("dark.png", "bright.png", "eight.png")]
    assert find_value_range(paths) == 16383
    dark, bright, eight = images_to_tensors(paths)
    assert torch.equal(dark, images_to_tensors(paths[0], value_range=16383)[0])
    assert not torch.equal(dark, images_to_tensors(paths[0])[0])
    assert 0.55 < bright.max() < 0.65
    assert torch.equal(eight, images_to_tensors(texture(0, 32))[0])  # 8 bits are 8 bits
    assert find_value_range(paths[2:]) is None


def test_values_beyond_the_models_range_count_as_its_end(tmp_path):
    write_deep(tmp_path / "a.png", bits=14)
    with pytest.warns(UserWarning, match="above 4095, the `value_range` of the model"):
        tensor = images_to_tensors(tmp_path / "a.png", value_range=4095)[0]
    assert tensor.min() == tensor.max() == 1.0


def test_the_range_is_saved_with_the_model_and_used(tmp_path, pipeline):
    write_deep(tmp_path / "a.png", bits=10)
    with pytest.raises(ValueError, match="`value_range` must be positive"):
        AnomalyDenoisePipeline(**{**pipeline.components, "value_range": 0.0})
    twelve = AnomalyDenoisePipeline(**pipeline.components, value_range=4095.0)
    twelve.save_pretrained(tmp_path / "model")
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path / "model")
    assert loaded.config.value_range == 4095.0
    values = np.asarray(Image.open(tmp_path / "a.png")) / np.float32(4095)
    of_file = loaded(tmp_path / "a.png", generator=generator())
    of_floats = loaded(values, generator=generator())
    np.testing.assert_allclose(of_file.anomaly_map, of_floats.anomaly_map, rtol=1e-4, atol=1e-5)
    own = pipeline(tmp_path / "a.png", generator=generator())  # taken as 10 bits
    assert not np.allclose(own.anomaly_map, of_file.anomaly_map, rtol=1e-2)


def test_calibration_keeps_the_range_of_its_images(tmp_path, pipeline):
    dark, bright = ([tmp_path / f"{bits}-{i}.png" for i in range(4)] for bits in (10, 12))
    for paths, bits in ((dark, 10), (bright, 12)):
        for path in paths:
            write_deep(path, bits=bits)
    pipe = AnomalyDenoisePipeline(**pipeline.components)
    for paths, end in ((dark, 1023), (bright, 4095)):  # what was found is found again
        pipe.calibrate(paths, generator=generator())
        assert pipe.value_range == end
    pipe.save_pretrained(tmp_path / "model")
    loaded = AnomalyDenoisePipeline.from_pretrained(tmp_path / "model")
    assert (loaded.value_range, loaded.config.value_range) == (4095, None)
    assert loaded.share_components(GradientDenoisingPipeline).config.value_range == 4095
    given = AnomalyDenoisePipeline(**pipeline.components, value_range=16383.0)
    assert given.calibrate(dark, generator=generator()).value_range == 16383
    eight = AnomalyDenoisePipeline(**pipeline.components)
    assert eight.calibrate([texture(i, 32) for i in range(4)], generator=generator()).value_range is None


def test_categories_of_one_model_share_a_range(tmp_path):
    pipe = tiny_pipeline(categories=["dark", "bright"])
    for bits in (10, 12):
        for i in range(4):
            write_deep(tmp_path / f"{bits}-{i}.png", bits=bits)
    dark, bright = ([tmp_path / f"{bits}-{i}.png" for i in range(4)] for bits in (10, 12))
    pipe.calibrate(dark, category="dark", generator=generator())
    with pytest.raises(ValueError, match="these images take 4095, and other categories were calibrated with 1023"):
        pipe.calibrate(bright, category="bright", generator=generator())
    pipe = tiny_pipeline(categories=["dark", "bright"])
    pipe.calibrate(bright, category="bright", generator=generator())
    pipe.calibrate(dark, category="dark", generator=generator())
    assert pipe.value_range == 4095


def test_the_gaussians_range_does_not_depend_on_the_batch(tmp_path):
    for i, bits in enumerate((10, 10, 12, 12)):
        write_deep(tmp_path / f"{i}.png", bits=bits)
    means = []
    for batch_size in (1, 4):
        pipe = tiny_pipeline()
        pipe.fit_gaussian([tmp_path / f"{i}.png" for i in range(4)], batch_size=batch_size, generator=generator())
        means.append(pipe.gaussian.mean)
    torch.testing.assert_close(means[0], means[1], rtol=1e-3, atol=1e-4)


def test_predict_and_the_pipeline_see_the_same_levels(tmp_path, pipeline):
    folder = tmp_path / "parts"
    folder.mkdir()
    write_deep(folder / "a.png")
    write_deep(folder / "b.png", bits=10)
    seen = []

    class Looking(AnomalyDenoisePipeline):
        def measure(self, pixel_values, *args, **kwargs):
            seen.append(pixel_values.clone())
            return super().measure(pixel_values, *args, **kwargs)

    looking = Looking(**pipeline.components, processing_resolution=32)
    paths = sorted(folder.iterdir())
    predict_files(looking, paths, tmp_path / "out")
    looking(paths)
    torch.testing.assert_close(seen[0], seen[1], rtol=0.0, atol=1e-6)
    assert len(seen[0][0, 0].unique()) > LEVELS


def test_one_range_holds_for_all_that_an_output_folder_holds(tmp_path, pipeline):
    (tmp_path / "parts").mkdir()
    write_deep(tmp_path / "parts" / "a.png", bits=10)
    (tmp_path / "parts" / "broken.png").write_bytes(b"nothing")
    counts = predict_files(pipeline, sorted((tmp_path / "parts").iterdir()), tmp_path / "out")
    assert (counts["scored"], counts["unreadable"]) == (1, 1)
    write_deep(tmp_path / "parts" / "b.png", bits=12)
    with pytest.raises(ValueError, match=r"results of another value_range \(value_range 1023.0 there and 4095.0 now\)"):
        predict_files(pipeline, sorted((tmp_path / "parts").iterdir()), tmp_path / "out")


def test_calibration_refuses_ranges_that_would_change_from_batch_to_batch(tmp_path, pipeline):
    write_deep(tmp_path / "deep.png")
    images = [texture(0, 32), texture(1, 32), tmp_path / "deep.png"]
    pipe = AnomalyDenoisePipeline(**pipeline.components)
    with pytest.raises(ValueError, match=r"`images\[2\]` has more than 8 bits, as not all images have: give a"):
        pipe.calibrate(images, statistics_images=images, batch_size=1, generator=generator())
    pipe.calibrate(images, statistics_images=images, batch_size=1, generator=generator(), value_range=4095)
    assert pipe.value_range == 4095


# -- training ----------------------------------------------------------------------------------------------------


def test_training_finds_the_range_and_keeps_the_levels(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for i, bits in enumerate((10, 9, 12, 8)):  # no two of them copies
        write_deep(folder / f"{i}.png", bits=bits)
    args = parse_args(["--train_data_dir", str(folder)])
    training, _, categories = load_good_images(args)
    assert args.value_range == 4095
    images = ResizedImages(training, 32, categories, args.value_range)
    for i in range(len(images)):
        expected = images_to_tensors(training[i]["image"], value_range=4095)[0]
        torch.testing.assert_close(images[i][0], expected, rtol=0.0, atol=1.0 / 65535)
    given = parse_args(["--train_data_dir", str(folder), "--value_range", "16383"])
    load_good_images(given)
    assert given.value_range == 16383


def test_training_on_8_bits_is_as_it_was(tmp_path):
    args = parse_args(["--train_data_dir", str(write_folder(tmp_path / "parts", 4, size=20))])
    training, _, categories = load_good_images(args)
    assert args.value_range is None
    pixels, _ = ResizedImages(training, 20, categories, args.value_range)[1]
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(training[1]["image"]))


@pytest.mark.parametrize("value", ["0", "-4095", "nan", "inf"])
def test_a_range_that_is_none_is_refused_at_once(value, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--train_data_dir", "x", "--value_range", value])
    assert "--value_range must be finite and above 0" in capsys.readouterr().err


def test_deep_images_of_a_data_set_are_deep_in_its_rows(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for i in range(3):
        write_deep(folder / f"{i}.png")
    assert load_anomaly_dataset(folder)[0]["image"].mode == "I;16"
