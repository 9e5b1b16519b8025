"""`diffad predict` over folders: every input accounted for, killed runs go on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import texture, textures, tiny_pipeline, write_folder, write_png
from PIL import Image

from diffad import AnomalyDenoisePipeline
from diffad.images import image_to_rgb
from diffad.predict import find_images, predict_files
from diffad.reading.decoding import decoded_batches
from diffad.reading.input_file import distinct_inputs


def read_scores(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def calibrated():
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_input_stands_in_the_scores_and_pictures_match_it(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 5)
    write_png(parts / "sub" / "000.png", textures(1, (20, 30))[0])
    (parts / "broken.png").write_bytes(b"")
    paths = find_images([parts])
    counts = predict_files(calibrated, paths, tmp_path / "out", batch_size=4)
    rows = read_scores(tmp_path / "out")
    assert [row["path"] for row in rows] == [str(p) for p in paths]
    assert counts["unreadable"] == 1
    assert counts["normal"] + counts["anomalous"] == 6
    broken = next(row for row in rows if row["path"].endswith("broken.png"))
    assert broken["verdict"] == "unreadable"
    assert "broken.png" in broken["message"]
    row = next(row for row in rows if row["path"].endswith("sub/000.png"))
    stored = np.asarray(Image.open(tmp_path / "out" / "maps" / "sub" / "000.png"))
    assert stored.shape == (20, 30)  # the image's own size
    assert (stored.min(), stored.max()) == (0, 65535)
    assert float(row["map_high"]) > float(row["map_low"])
    assert np.asarray(Image.open(tmp_path / "out" / "overlays" / "sub" / "000.png")).shape == (20, 30, 3)
    assert set(np.unique(Image.open(tmp_path / "out" / "masks" / "sub" / "000.png"))) <= {0, 255}
    assert not list((tmp_path / "out").rglob("*.unfinished"))


def test_scores_are_those_of_the_pipeline_and_do_not_depend_on_the_batch(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 5)
    write_png(parts / "large.png", textures(1, (50, 40))[0])
    paths = find_images([parts])
    for batch_size in (1, 3):
        predict_files(calibrated, paths, tmp_path / str(batch_size), batch_size=batch_size)
    one, three = (np.array([float(r["score"]) for r in read_scores(tmp_path / b)]) for b in ("1", "3"))
    np.testing.assert_allclose(one, three, rtol=1e-3)
    direct = [calibrated(str(path)) for path in paths]
    np.testing.assert_allclose(one, [out.anomaly_score[0] for out in direct], rtol=1e-3)
    row = read_scores(tmp_path / "1")[5]
    low, high = float(row["map_low"]), float(row["map_high"])
    stored = np.asarray(Image.open(tmp_path / "1" / "maps" / "large.png")) / 65535.0 * (high - low) + low
    np.testing.assert_allclose(stored, direct[5].anomaly_map[0], atol=1e-3 * (high - low))


def test_a_second_run_does_only_what_is_new(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 3)
    predict_files(calibrated, find_images([parts]), tmp_path / "out")
    before = {row["path"]: row for row in read_scores(tmp_path / "out")}
    write_png(parts / "new.png", textures(1, first_seed=99)[0])
    seen = []
    counts = predict_files(calibrated, find_images([parts]), tmp_path / "out", report=seen.append)
    assert counts["skipped"] == 3
    assert [Path(row["path"]).name for row in seen] == ["new.png"]
    after = {row["path"]: row for row in read_scores(tmp_path / "out")}
    assert len(after) == 4
    assert all(after[path] == row for path, row in before.items())


def test_a_column_that_somebody_added_is_not_lost(calibrated, tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 3)])
    predict_files(calibrated, paths, tmp_path / "out")
    rows = [{**row, "operator": "Bob"} for row in read_scores(tmp_path / "out")]
    with open(tmp_path / "out" / "scores.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=r"scores\.csv has the column 'operator', which would be lost"):
        predict_files(calibrated, paths, tmp_path / "out")
    assert read_scores(tmp_path / "out") == rows


@pytest.mark.parametrize("name", ["scores.csv", "scores.partial.csv"])
def test_a_table_that_excel_has_saved_is_taken_up(calibrated, tmp_path, name):
    """Its "CSV UTF-8" begins with a byte order mark."""
    paths = find_images([write_folder(tmp_path / "parts", 3)])
    predict_files(calibrated, paths, tmp_path / "out")
    rows = read_scores(tmp_path / "out")
    content = (tmp_path / "out" / "scores.csv").read_bytes()
    (tmp_path / "out" / "scores.csv").unlink()
    (tmp_path / "out" / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert predict_files(calibrated, paths, tmp_path / "out")["skipped"] == 3
    assert read_scores(tmp_path / "out") == rows


@pytest.mark.parametrize("name", ["scores.csv", "scores.partial.csv"])
@pytest.mark.parametrize(("column", "text"), [("score", "2,37"), ("score", "n/a"), ("p_value", "nan")])
def test_a_number_that_somebody_made_none_is_named_before_any_work(calibrated, tmp_path, name, column, text):
    parts = write_folder(tmp_path / "parts", 3)
    predict_files(calibrated, find_images([parts]), tmp_path / "out")
    rows = read_scores(tmp_path / "out")
    rows[1][column] = text
    (tmp_path / "out" / "scores.csv").unlink()
    table = tmp_path / "out" / name
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    before, scored = table.read_bytes(), []
    write_png(parts / "new.png", textures(1, first_seed=99)[0])
    message = rf"{name} holds the {column} '{text}' of .*001\.png: it is no number\. Put the number back, or take"
    with pytest.raises(ValueError, match=message):
        predict_files(calibrated, find_images([parts]), tmp_path / "out", report=scored.append)
    assert not scored
    assert table.read_bytes() == before
    table.write_bytes(before.replace(b"\r\n" + before.splitlines()[2], b""))  # the row is taken away
    assert predict_files(calibrated, find_images([parts]), tmp_path / "out")["skipped"] == 2


def test_a_folder_in_the_tables_place_is_named_before_any_work(calibrated, tmp_path):
    (tmp_path / "out" / "scores.csv").mkdir(parents=True)
    scored: list[dict] = []
    with pytest.raises(ValueError, match=r"scores\.csv is a folder in the table's place. Give another `output_dir`"):
        predict_files(
            calibrated, find_images([write_folder(tmp_path / "parts", 3)]), tmp_path / "out", report=scored.append
        )
    assert not scored


def test_a_half_written_line_of_a_killed_run_is_done_again(calibrated, tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 3)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores.partial.csv").write_text(
        f"path,score,p_value,verdict,map_low,map_high,message\n{paths[0]},1.5,0.5,normal,0,1,\n{paths[1]},2.5,0."
    )
    counts = predict_files(calibrated, paths, out)
    assert counts["skipped"] == 1
    rows = read_scores(out)
    assert [row["path"] for row in rows] == [str(p) for p in paths]
    assert rows[0]["score"] == "1.5"
    assert not (out / "scores.partial.csv").exists()


def test_sigkill_leaves_no_half_file_and_the_next_run_goes_on(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path / "model")
    parts = write_folder(tmp_path / "parts", 60)
    command = [sys.executable, "-m", "diffad.cli", "predict", str(tmp_path / "model"), str(parts)]
    command += ["--output", str(tmp_path / "out"), "--batch-size", "1", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    deadline = time.time() + 120
    while len(list((tmp_path / "out" / "maps").glob("*.png"))) < 3 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "scores.csv").exists()  # it says that all is done
    for path in (tmp_path / "out").rglob("*.png"):
        if not path.name.startswith("."):
            Image.open(path).load()  # whole
    counts = predict_files(calibrated, find_images([parts]), tmp_path / "out")
    assert counts["skipped"] >= 2
    assert len(read_scores(tmp_path / "out")) == 60


def test_what_could_not_be_read_is_tried_again(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    (parts / "late.png").write_bytes(b"")
    assert predict_files(calibrated, find_images([parts]), tmp_path / "out")["unreadable"] == 1
    # a run over others keeps the row
    assert predict_files(calibrated, [parts / "000.png"], tmp_path / "out")["unreadable"] == 0
    assert [row["verdict"] for row in read_scores(tmp_path / "out")].count("unreadable") == 1
    write_png(parts / "late.png", textures(1)[0])
    counts = predict_files(calibrated, find_images([parts]), tmp_path / "out")
    assert (counts["unreadable"], counts["skipped"]) == (0, 2)
    assert sorted(Path(row["path"]).name for row in read_scores(tmp_path / "out")) == ["000.png", "001.png", "late.png"]


def test_two_inputs_never_share_their_pictures(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 1)
    Image.open(parts / "000.png").save(parts / "000.jpg")
    write_png(parts / "sub" / "000.png", textures(1)[0])
    predict_files(calibrated, find_images([parts]), tmp_path / "out")
    maps = tmp_path / "out" / "maps"
    assert sorted(path.relative_to(maps).as_posix() for path in maps.rglob("*.png")) == [
        "000.jpg.png",
        "000.png",
        "sub/000.png",
    ]
    # names start from one folder for good: later runs may go deeper, not elsewhere
    predict_files(calibrated, [parts / "sub" / "000.png"], tmp_path / "out")
    other = write_folder(tmp_path / "other", 1)
    with pytest.raises(ValueError, match=r"images in .*parts.* and .*other lies elsewhere.*`output_dir`"):
        predict_files(calibrated, find_images([other]), tmp_path / "out")


def test_results_of_another_calibration_are_not_taken_for_these(calibrated, tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 2)])
    predict_files(calibrated, paths, tmp_path / "out")
    other = tiny_pipeline()
    other.calibrate(textures(12, first_seed=40), false_alarm_rate=0.25)
    with pytest.raises(ValueError, match=r"out holds results of another calibration.*`output_dir`"):
        predict_files(other, paths, tmp_path / "out")
    assert predict_files(calibrated, paths, tmp_path / "out")["skipped"] == 2
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`output_dir` must be a folder, but .*file is a file"):
        predict_files(calibrated, paths, tmp_path / "file")


def test_results_of_another_model_without_thresholds_are_not_taken_for_these(tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 2)])
    first, second = tiny_pipeline(), tiny_pipeline()
    with torch.no_grad():
        next(second.unet.parameters()).add_(0.1)
    first.save_pretrained(tmp_path / "first")
    again = AnomalyDenoisePipeline.from_pretrained(tmp_path / "first")
    predict_files(first, paths, tmp_path / "out")
    assert predict_files(again, paths, tmp_path / "out")["skipped"] == 2
    with pytest.raises(ValueError, match=r"out holds results of another model.*`output_dir`"):
        predict_files(second, paths, tmp_path / "out")


def test_results_of_another_precision_are_not_taken_for_these(tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 2)])
    pipeline = tiny_pipeline().to("cpu")
    predict_files(pipeline, paths, tmp_path / "out")
    settings = tmp_path / "out" / "settings.json"
    said = json.loads(settings.read_text())
    assert said.pop("precision") == "float32"
    settings.write_text(json.dumps(said))  # as versions before it wrote
    assert predict_files(pipeline, paths, tmp_path / "out")["skipped"] == 2
    settings.write_text(json.dumps({**said, "precision": "float32"}))
    message = r"results of another precision.*precision float32 there and bfloat16 now.*`output_dir`"
    with pytest.raises(ValueError, match=message):
        predict_files(pipeline.to(torch.bfloat16), paths, tmp_path / "out")


def test_a_unified_model_marks_pixels_by_its_categorys_own_threshold(tmp_path):
    pipeline = tiny_pipeline(categories=["a", "b"])
    for category in "ab":
        pipeline.calibrate(textures(12), false_alarm_rate=0.3, category=category)
    pipeline.calibration.pixel_threshold[:] = torch.tensor([1e-6, 1e6])
    paths = find_images([write_folder(tmp_path / "parts", 1)])
    for category in "ab":
        predict_files(pipeline, paths, tmp_path / category, category=category)
    plain = np.asarray(Image.open(paths[0]))
    coloured, clear = (np.asarray(Image.open(tmp_path / c / "overlays" / "000.png")) for c in "ab")
    assert np.array_equal(clear, plain)  # far below the threshold there is no colour
    assert not np.array_equal(coloured, plain)
    with pytest.raises(ValueError, match=r"`category` is needed.*a, b"):
        predict_files(pipeline, paths, tmp_path / "none")


def test_the_sheet_shows_the_highest_scores_first(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 26)
    (parts / "broken.png").write_bytes(b"")
    predict_files(calibrated, find_images([parts]), tmp_path / "out")
    scores = {row["path"]: float(row["score"]) for row in read_scores(tmp_path / "out") if row["score"]}
    ordered = sorted(scores, key=scores.get, reverse=True)
    sheet = Image.open(tmp_path / "out" / "most_anomalous.png").convert("RGB")
    assert sheet.width == 6 * 164  # 24 of 26, in four rows
    row_height = sheet.height // 4
    for place in (0, 1, 23):
        left, top = place % 6 * 164, place // 6 * row_height
        tile = np.asarray(sheet.crop((left, top, left + 160, top + 160)), float)
        shown = Image.open(tmp_path / "out" / "overlays" / Path(ordered[place]).name).resize((160, 160), 2)
        assert np.abs(tile - np.asarray(shown, float)).mean() < 2.0, place


def test_inputs_of_every_kind_and_depth_keep_memory_in_bytes(calibrated, tmp_path):
    """What waits for its turn is 8-bit pixels and the networks' small input, never a large image in float32."""
    parts = tmp_path / "parts"
    write_png(parts / "large.png", textures(1, (300, 400))[0])
    Image.fromarray(np.full((30, 20), 30000, np.uint16)).save(parts / "deep.png")
    Image.open(parts / "large.png").convert("L").save(parts / "grey.bmp")
    paths = find_images([parts])
    with ThreadPoolExecutor(1) as pool:
        (batch,) = decoded_batches(list(enumerate(distinct_inputs(paths))), 16, 4, pool, None)
    for (_, one, decoded), expected in zip(batch, paths, strict=True):
        path = one.path
        assert path == expected
        assert decoded.pixels.dtype == np.uint8
        assert np.array_equal(decoded.pixels, np.asarray(image_to_rgb(Image.open(path))))
        assert decoded.network_input.shape == (16, 16, 3)


def test_a_large_image_has_maps_and_masks_of_its_own_size_and_a_smaller_overlay(calibrated, tmp_path):
    (tmp_path / "parts").mkdir()
    grey = Image.fromarray(texture(3, 64)).resize((5000, 3500)).convert("L")  # 17.5 million pixels
    grey.save(tmp_path / "parts" / "large.jpg", quality=85)
    paths = find_images([tmp_path / "parts"])
    predict_files(calibrated, paths, tmp_path / "out", num_workers=1)
    output = calibrated(paths)
    (row,) = read_scores(tmp_path / "out")
    low, high = float(row["map_low"]), float(row["map_high"])
    stored = np.asarray(Image.open(tmp_path / "out" / "maps" / "large.jpg.png")) / 65535 * (high - low) + low
    np.testing.assert_allclose(stored, output.anomaly_map[0], rtol=1e-3, atol=(high - low) / 1000)
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "large.jpg.png")) == 255
    assert mask.shape == (3500, 5000)
    assert (mask != output.anomaly_mask[0]).mean() < 1e-4
    assert Image.open(tmp_path / "out" / "overlays" / "large.jpg.png").size == (2500, 1750)


@pytest.mark.parametrize("mode", ["I;16", "P"])
def test_large_images_of_every_mode_are_scored(calibrated, tmp_path, mode):
    pixels = Image.fromarray(texture(3, 64)).resize((4100, 4100))  # 16.8 million
    if mode == "I;16":
        image = Image.fromarray(np.asarray(pixels.convert("L"), np.uint16) * 200)
    else:
        image = pixels.convert(mode)
    (tmp_path / "parts").mkdir()
    image.save(tmp_path / "parts" / "large.tif")
    assert predict_files(calibrated, find_images([tmp_path / "parts"]), tmp_path / "out")["unreadable"] == 0
    assert Image.open(tmp_path / "out" / "overlays" / "large.tif.png").size == (2050, 2050)


def test_uncalibrated_gives_scores_without_verdict(tmp_path):
    paths = find_images([write_folder(tmp_path / "parts", 2)])
    counts = predict_files(tiny_pipeline(), paths, tmp_path / "out")
    assert counts["scored"] == 2
    assert not (tmp_path / "out" / "masks").exists()
    assert {row["verdict"] for row in read_scores(tmp_path / "out")} == {"scored"}


def test_outputs_below_the_inputs_are_no_inputs_of_the_next_run(calibrated, tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    for skipped in (0, 2):
        paths = find_images([parts], parts / "out")
        assert [path.name for path in paths] == ["000.png", "001.png"]
        assert predict_files(calibrated, paths, parts / "out")["skipped"] == skipped


def test_rows_of_another_working_folder_stay(calibrated, tmp_path, monkeypatch):
    parts = write_folder(tmp_path / "parts", 2)
    monkeypatch.chdir(tmp_path)
    predict_files(calibrated, [Path("parts/000.png")], tmp_path / "out")
    monkeypatch.chdir("/")
    predict_files(calibrated, [parts / "001.png"], tmp_path / "out")
    assert [row["path"] for row in read_scores(tmp_path / "out")] == ["parts/000.png", str(parts / "001.png")]


def test_find_images_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no images"):
        find_images([tmp_path])
