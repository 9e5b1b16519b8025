"""Good images of training: held out, resized once, balanced, augmented, in batches."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from conftest import generator, texture, textures, write_folder, write_mvtec
from datasets import Dataset, Features
from datasets import Image as HubImage
from PIL import Image

from diffad.seeding import step_generator
from diffad.training import train_ddpm
from diffad.training.data import BalancedSampler, ResizedImages, augment, create_data_loader, load_good_images
from diffad.training.loop import create_accelerator, training_batches

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def shared(**values) -> Namespace:
    return Namespace(**{**vars(train_ddpm.parse_args(["--train_data_dir", "x", "--preset", "cpu-64"])), **values})


def test_the_same_share_of_every_category_is_held_out_by_the_seed(tmp_path):
    data = write_mvtec(tmp_path, {"tile": 20, "cable": 10})
    args = shared(train_data_dir=str(data), calibration_fraction=0.3)
    training, held_out, categories = load_good_images(args)
    assert categories == ["cable", "tile"]
    assert sorted(held_out["category"]) == ["cable"] * 3 + ["tile"] * 6
    assert len(training) == 21
    assert not set(training["path"]) & set(held_out["path"])
    again = load_good_images(args)[1]
    other = load_good_images(shared(train_data_dir=str(data), calibration_fraction=0.3, seed=1))[1]
    assert again["path"] == held_out["path"]
    assert other["path"] != held_out["path"]


def test_images_without_a_path_are_held_out_by_what_they_show(tmp_path):
    images = [Image.fromarray(one) for one in textures(12)]
    Dataset.from_dict({"image": images}, features=Features({"image": HubImage()})).to_parquet(tmp_path / "a.parquet")
    digests = []
    for seed in (0, 0, 1):
        args = shared(train_data_dir=str(tmp_path), calibration_fraction=0.3, seed=seed)
        load_good_images(args)
        digests.append(args.held_out_digest)
    assert digests[0] == digests[1] != digests[2]


def test_all_photographs_of_a_part_are_held_out_or_none(tmp_path):
    folder = write_folder(tmp_path / "part", 24)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"serial{i % 8}-view{i // 8}.png")
    args = shared(train_data_dir=str(folder), calibration_fraction=0.25, part_pattern=r"(serial\d+)-")
    for seed in range(3):
        args.seed = seed
        training, held_out, _ = load_good_images(args)
        sides = [{Path(path).name.split("-")[0] for path in side["path"]} for side in (training, held_out)]
        assert [len(side) for side in sides] == [6, 2]
        assert not sides[0] & sides[1]
        assert (len(training), len(held_out)) == (18, 6)
    args.part_pattern = r"lot\d+"
    with pytest.raises(ValueError, match=r"--part_pattern 'lot.*' finds no part in the path '.*serial0-view0.png'"):
        load_good_images(args)
    args.part_pattern = "view"  # one part in all
    with pytest.raises(ValueError, match="has 24 good images, and of parts by --part_pattern 1: too few"):
        load_good_images(args)


@pytest.mark.parametrize("fraction", [0.9, 0.99])
def test_a_fraction_that_leaves_too_few_to_train_is_named(tmp_path, fraction):
    data = str(write_folder(tmp_path / "part", 15))
    with pytest.raises(ValueError, match=rf"--calibration_fraction {fraction} .*'part' of .* has 15 good images.*0\.2"):
        load_good_images(shared(train_data_dir=data, calibration_fraction=fraction))
    assert len(load_good_images(shared(train_data_dir=data, calibration_fraction=0.2))[0]) == 12


def test_too_few_images_are_not_blamed_on_the_fraction(tmp_path):
    with pytest.raises(ValueError, match="has 2 good images: too few to train and to calibrate"):
        load_good_images(shared(train_data_dir=str(write_folder(tmp_path / "part", 2)), calibration_fraction=0.9))


def test_a_large_part_is_not_held_out_where_smaller_ones_will_do(tmp_path):
    folder = write_folder(tmp_path / "part", 24)
    for i, path in enumerate(sorted(folder.iterdir())):  # lot 1, serial 23 is not lot 12, serial 3
        name = ("lot1-serial23", "lot12-serial3")[i] if i < 2 else "lot1-serial4"
        path.rename(folder / f"{name}-view{i}.png")
    for seed in range(4):
        args = shared(train_data_dir=str(folder), part_pattern=r"lot(\d+)-serial(\d+)", seed=seed)
        args.calibration_fraction = 0.05  # one image
        held_out = load_good_images(args)[1]["path"]
        assert len(held_out) == 1
        assert "serial4" not in held_out[0]
    args.calibration_fraction = 0.15
    assert len(load_good_images(args)[1]) == 2


def test_a_stream_trains_as_the_data_set_does(tmp_path):
    data = str(write_mvtec(tmp_path, {"tile": 5, "cable": 4}))
    streamed = load_good_images(shared(train_data_dir=data, streaming=True))
    loaded = load_good_images(shared(train_data_dir=data))
    assert streamed[2] == loaded[2]
    for one, other in zip(streamed[:2], loaded[:2], strict=True):
        assert one["path"] == other["path"]
        assert all(np.array_equal(a, b) for a, b in zip(one["image"], other["image"], strict=True))
        assert one.cache_files  # on disk: memory does not grow with the images


def test_images_are_resized_once_and_read_from_disk(tmp_path):
    args = shared(train_data_dir=str(write_folder(tmp_path / "part", 8, size=20)))
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 20, categories)
    assert len(images) == 7
    pixels, index = images[2]
    assert pixels.dtype == torch.uint8
    assert index == 0
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(training[2]["image"]))
    assert images.table.cache_files  # memory-mapped: memory does not grow with the images
    assert ResizedImages(training, 8, categories)[0][0].shape == (3, 8, 8)


def batch(count: int = 4, size: int = 16) -> torch.Tensor:
    return torch.stack([torch.from_numpy(texture(i, size)).permute(2, 0, 1) for i in range(count)])


def test_a_long_image_is_turned_and_not_sheared():
    pixels = torch.zeros(1, 3, 33, 65, dtype=torch.uint8)
    pixels[..., 16, :] = 255  # a line across the middle
    turned = augment(pixels, shared(rotation_degrees=20.0), generator(1))[0, 0]
    rows = (turned[:, 8:57] + 1.0).argmax(dim=0).float()  # where the line is now, in each column
    x, y = torch.arange(8.0, 57.0) - 32.0, rows - 16.0
    slope = float((x * y).sum() / x.square().sum())
    square = augment(torch.nn.functional.pad(pixels, (0, 0, 16, 16)), shared(rotation_degrees=20.0), generator(1))[0, 0]
    of_square = (square[:, 8:57] + 1.0).argmax(dim=0).float() - 32.0
    assert slope == pytest.approx(float((x * of_square).sum() / x.square().sum()), abs=0.02)
    assert abs(slope) > 0.05


def test_augmentation_off_only_scales():
    args = shared(rotation_degrees=0.0)
    images = augment(batch(), args, generator())
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, batch().float() / 127.5 - 1.0)


def test_flips_are_exact_and_half_of_the_images():
    plain = batch(64).float() / 127.5 - 1.0
    for flag, dim in (("random_flip", 3), ("random_vertical_flip", 2)):
        images = augment(batch(64), shared(rotation_degrees=0.0, **{flag: True}), generator())
        kept = (images - plain).abs().amax(dim=(1, 2, 3)) < 1e-4
        flipped = (images - plain.flip(dim)).abs().amax(dim=(1, 2, 3)) < 1e-4
        assert (kept | flipped).all()
        assert 16 < int(flipped.sum()) < 48


def test_rotation_turns_by_no_more_than_asked_and_invents_no_values():
    ramp = torch.arange(64, dtype=torch.uint8).expand(32, 3, 64, 64)
    images = augment(ramp, shared(rotation_degrees=10.0), generator())
    assert images.min() >= -1.0
    assert images.max() <= 63 / 127.5 - 1.0 + 1e-5
    # the gradient of a ramp turns with the image
    inner = images[:, 0, 24:40, 24:40]
    dx, dy = inner.diff(dim=2)[:, :15].mean(dim=(1, 2)), inner.diff(dim=1)[:, :, :15].mean(dim=(1, 2))
    angles = torch.atan2(dy, dx).rad2deg()
    assert angles.abs().max() <= 10.1
    assert angles.abs().max() > 5.0
    assert angles.min() < 0 < angles.max()
    again = augment(ramp, shared(rotation_degrees=10.0), generator())
    assert torch.equal(images, again)


def test_batches_of_a_resumed_run_are_those_of_the_first(tmp_path):
    args = shared(train_data_dir=str(write_folder(tmp_path / "part", 15)), train_batch_size=4, output_dir=str(tmp_path))
    accelerator = create_accelerator(args)
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 16, categories)

    def batches(first: int, last: int) -> list[tuple[int, torch.Tensor]]:
        loader = accelerator.prepare(create_data_loader(images, args))
        return [(n, pixels) for n, (pixels, _) in training_batches(loader, accelerator, first, last)]

    whole, resumed = batches(0, 11), batches(4, 11)  # three batches an epoch
    assert [number for number, _ in whole] == list(range(11))
    assert [number for number, _ in resumed] == list(range(4, 11))
    for (_, expected), (_, actual) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(whole[0][1], whole[3][1])  # epochs are shuffled anew
    draws = {step_generator(seed, n, accelerator).initial_seed() for seed in (0, 1) for n in range(50)}
    assert len(draws) == 100


# -- balanced categories -----------------------------------------------------------------------------------------


def test_every_category_comes_equally_often_and_no_image_more_often_than_another():
    of_image = np.array([0] * 5 + [1] * 2 + [2] * 3)
    sampler = BalancedSampler(of_image, seed=0)
    assert len(sampler) == 15
    seen = np.zeros(10, dtype=int)
    orders = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == 15
        assert np.bincount(of_image[orders[-1]]).tolist() == [5, 5, 5]
        assert all(sorted(of_image[orders[-1][i : i + 3]]) == [0, 1, 2] for i in range(0, 15, 3))  # so is each batch
        seen += np.bincount(orders[-1], minlength=10)
        for category in range(3):
            counts = seen[of_image == category]
            assert counts.max() - counts.min() <= 1
    assert seen.tolist() == [6] * 5 + [15] * 2 + [10] * 3
    assert len({tuple(order) for order in orders}) == 6
    places = {tuple(of_image[order]) for order in orders}
    assert len(places) > 1  # the categories' order changes, too

    sampler.set_epoch(3)
    assert list(sampler) == orders[3]  # seed and epoch alone decide
    other = BalancedSampler(of_image, seed=1)
    other.set_epoch(3)
    assert list(other) != orders[3]


def test_balanced_batches_of_a_resumed_run_are_those_of_the_first(tmp_path):
    data = write_mvtec(tmp_path / "data", {"tile": 14, "cable": 4})
    args = shared(train_data_dir=str(data), train_batch_size=4, output_dir=str(tmp_path), balance_categories=True)
    accelerator = create_accelerator(args)
    training, _, categories = load_good_images(args)
    images = ResizedImages(training, 16, categories)
    assert np.bincount(images.category_index).tolist() == [3, 12]

    def batches(first: int, last: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        loader = accelerator.prepare(create_data_loader(images, args))
        return [(n, *batch) for n, batch in training_batches(loader, accelerator, first, last)]

    whole, resumed = batches(0, 15), batches(8, 15)  # six batches an epoch
    assert [number for number, *_ in resumed] == list(range(8, 15))
    for (_, expected, classes), (_, actual, _) in zip(whole[8:], resumed, strict=True):
        assert torch.equal(actual, expected)
        assert sorted(classes.tolist()) == [0, 0, 1, 1]
    assert not torch.equal(whole[0][1], whole[6][1])  # epochs differ


def test_two_processes_share_the_batches_of_one():
    class Images(torch.utils.data.Dataset):
        category_index = np.array([0] * 12 + [1] * 3)

        def __len__(self) -> int:
            return 15

        def __getitem__(self, i: int) -> int:
            return i

    args = shared(train_batch_size=4, balance_categories=True)
    loader = create_data_loader(Images(), args)

    def batches(processes: int, index: int, epoch: int) -> list[list[int]]:
        options = {"num_processes": processes, "process_index": index, "use_seedable_sampler": True, "data_seed": 0}
        prepared = prepare_data_loader(loader, **options)
        prepared.set_epoch(epoch)
        return [batch.tolist() for batch in prepared]

    for epoch in (0, 3):
        one = batches(1, 0, epoch)
        assert len(one) == 6
        assert batches(2, 0, epoch) == one[::2]
        assert batches(2, 1, epoch) == one[1::2]
    assert batches(1, 0, 0) != batches(1, 0, 3)
