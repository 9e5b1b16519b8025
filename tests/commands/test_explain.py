"""`diffad explain` says of each image what its pipeline's `explain` says, and which good images it is like."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import texture, textures, tiny_extractor, tiny_pipeline, write_folder, write_png
from tiny_diad import tiny_diad
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline
from diffad.cli import app, main
from diffad.predict import predict_files
from diffad.reading.inputs import find_images


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["explain", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Of two categories, whose good images are textures."""
    extractor = tiny_extractor(image_size=32)
    pipeline = AnomalyDenoisePipeline(None, None, extractor, position_trust=0.0, categories=["nut", "bolt"])
    for name in ("nut", "bolt"):
        pipeline.calibrate(textures(20, 32), category=name, false_alarm_rate=0.1)
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


def test_json_is_what_the_pipeline_explains(model, tmp_path):
    parts = write_folder(tmp_path / "parts", 3, 32, first_seed=50)
    good = write_folder(tmp_path / "good", 5, 32)
    like = write_png(good / "like.png", texture(51, 32))  # the second part again
    options = ("--category", "bolt", "--good-images", good, "--num-nearest", 2, "--batch-size", 2, "--json")
    told = [json.loads(line) for line in run(model, parts, *options).splitlines()]
    pipeline = AnomalyDenoisePipeline.from_pretrained(model)
    paths = sorted(parts.iterdir())
    assert [one["path"] for one in told] == [str(path) for path in paths]
    for one, path in zip(told, paths, strict=True):
        expected = pipeline.explain(path, category="bolt", good_images=sorted(good.iterdir()), num_nearest=2)
        assert one["score"] == pytest.approx(expected.score, rel=1e-6)
        assert tuple(one["peak"]) == expected.peak
        assert one["maps"] == pytest.approx(expected.maps, rel=1e-5)
        found = [(good_image["path"], good_image["distance"]) for good_image in one["nearest"]]
        assert [name for name, _ in found] == [str(sorted(good.iterdir())[i]) for i, _ in expected.nearest]
        assert [distance for _, distance in found] == pytest.approx([d for _, d in expected.nearest], abs=1e-3)
    assert told[1]["nearest"][0]["path"] == str(like)


def test_words_name_image_map_layers_and_the_good_image_most_like_it(model, tmp_path):
    part = write_png(tmp_path / "part.png", texture(3, 32))
    good = write_folder(tmp_path / "good", 5, 32)
    lines = run(model, part, "--category", "nut", "--good-images", good).splitlines()
    assert lines[0].startswith(f"{part}: score ")
    assert "gaussian" in lines[1]
    assert "stride 2" in lines[1]
    assert lines[2].startswith(f"  Most like: {sorted(good.iterdir())[3]} (")


def test_an_unreadable_image_stops_no_other(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    write_png(tmp_path / "b.png", texture(3, 32))
    result = CliRunner().invoke(app, ["explain", str(model), str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert [line.split(": score")[0] for line in result.stdout.splitlines()[::2]] == [str(tmp_path / "b.png")]
    assert "a.png" in result.stderr
    run(model, tmp_path / "a.png", code=4)


def test_an_unreadable_good_image_stops_no_comparison(model, tmp_path):
    part = write_png(tmp_path / "part.png", texture(3, 32))
    good = write_folder(tmp_path / "good", 5, 32)
    (good / "002.png").write_bytes(b"no picture")
    arguments = ["explain", str(model), str(part), "--category", "nut", "--good-images", str(good)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert f"Most like: {good / '003.png'} (" in result.stdout
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("not compared with:"))
    assert "002.png cannot be read" in line


def test_deep_images_have_one_range_and_the_scores_of_predict(model, tmp_path):
    """A range of its own for each would be another score; a good image of 8 bits is compared with as well."""
    for i in range(3):
        deep = texture(i, 32)[..., 0].astype(np.uint16) * 4
        deep[0, 0] = 4000 if i == 2 else 1000
        write_png(tmp_path / "parts" / f"{i}.png", deep)
    good = write_folder(tmp_path / "good", 3, 32)
    write_png(good / "deep.png", deep)
    pipeline = AnomalyDenoisePipeline.from_pretrained(model)
    predict_files(pipeline, find_images([tmp_path / "parts"]), tmp_path / "results", category="nut")
    with open(tmp_path / "results" / "scores.csv", newline="") as file:
        expected = [float(row["score"]) for row in csv.DictReader(file)]
    said = run(model, tmp_path / "parts", "--category", "nut", "--good-images", good, "--json").splitlines()
    assert [json.loads(line)["score"] for line in said] == pytest.approx(expected, rel=1e-4)
    assert json.loads(said[2])["nearest"][0]["path"] == str(good / "deep.png")


def test_what_explains_nothing_is_refused(model, tmp_path, capsys):
    part = write_png(tmp_path / "part.png", texture(3, 32))

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit):
            main(["explain", *map(str, arguments)])
        return capsys.readouterr().err

    assert "--category, of nut, bolt" in refused(model, part, "--good-images", part)
    assert "--category" in refused(model, part, "--category", "gear")
    (tmp_path / "manifest.csv").write_text("path\npart.png\n")
    assert "manifest.csv is no image. Give the images themselves" in refused(model, tmp_path / "manifest.csv")
    tiny_diad().save_pretrained(tmp_path / "diad")
    assert "must be an AnomalyDenoise pipeline" in refused(tmp_path / "diad", part)
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    assert "calibrated" in refused(tmp_path / "plain", part)
    assert "MODEL must be a saved pipeline" in refused(tmp_path / "parts.onnx", part)
