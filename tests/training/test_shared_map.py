"""Images decoded, and encodings computed, once a machine: each process brings a share and reads the whole."""

from __future__ import annotations

import torch
from conftest import write_folder
from launching import launch

from diffad.data import load_anomaly_dataset
from diffad.training.cached_encodings import CachedEncodings
from diffad.training.data import ResizedImages

PAIRS = [(False, False), (True, False)]

# Notes every image that is decoded and every one that is encoded, then all items, as this process reads them.
SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffad.data import load_anomaly_dataset
from diffad.training import data
from diffad.training.cached_encodings import CachedEncodings

accelerator = Accelerator()
process = accelerator.process_index
decode = data.resize_image

def noted_decode(image, *options):
    with open(f"decoded-{process}", "a") as file:
        file.write(Path(image.filename).name + "\\n")
    return decode(image, *options)

def noted_encode(pixel_values):
    with open(f"encoded-{process}", "a") as file:
        file.write("image\\n" * len(pixel_values))
    return pixel_values.mean(dim=(2, 3))

data.resize_image = noted_decode
images = data.ResizedImages(load_anomaly_dataset(sys.argv[1]), 8, ["part"])
cached = CachedEncodings(images, noted_encode, [(False, False), (True, False)], (3,))
assert cached.table.cache_files and images.table.cache_files
torch.save([cached[i] for i in range(len(cached))], f"items-{process}.pt")
try:
    data.shared_map(Dataset.from_dict({"index": [0]}), lambda row: row)
except ValueError as error:
    Path(f"refused-{process}").write_text(str(error))
accelerator.end_training()
"""


def test_two_processes_decode_and_encode_every_image_once_and_read_all(tmp_path):
    data = write_folder(tmp_path / "part", 7)
    (script := tmp_path / "script.py").write_text(SCRIPT)
    launch(script, data, processes=2, cwd=tmp_path)

    decoded = [(tmp_path / f"decoded-{process}").read_text().split() for process in range(2)]
    assert decoded[0] + decoded[1] == [f"{i:03}.png" for i in range(7)]
    assert [len(one) for one in decoded] == [4, 3]
    encoded = [len((tmp_path / f"encoded-{process}").read_text().split()) for process in range(2)]
    assert encoded == [4 * 2, 3 * 2]  # with the flips

    images = ResizedImages(load_anomaly_dataset(data), 8, ["part"])
    expected = CachedEncodings(images, lambda x: x.mean(dim=(2, 3)), PAIRS, (3,))
    for process in range(2):
        items = torch.load(tmp_path / f"items-{process}.pt", weights_only=True)
        assert len(items) == 7
        for (pixels, encodings, index), (own_pixels, own_encodings, own_index) in zip(items, expected, strict=True):
            assert torch.equal(pixels, own_pixels)
            torch.testing.assert_close(encodings, own_encodings)
            assert index == own_index
        refused = (tmp_path / f"refused-{process}").read_text()
        assert refused == "1 training images are too few for 2 processes."
