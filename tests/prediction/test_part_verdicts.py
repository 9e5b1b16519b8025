"""One verdict for a part of several pictures: its rate, what it asks for, and the command that gives it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import generator, textures, tiny_pipeline, write_folder, write_png
from typer.testing import CliRunner

from diffad.cli import app
from diffad.predict import predict_files
from diffad.prediction.part_verdicts import check_parts, read_parts, write_part_verdicts
from diffad.reading.inputs import find_images


@pytest.fixture(scope="module")
def calibrated():
    """19 good images set its thresholds, so that no p-value is below 0.05."""
    return tiny_pipeline().calibrate(textures(38), false_alarm_rate=0.1, generator=generator())


def write_parts(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("image", "part"), *rows])
    return path


def read_verdicts(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "part_verdicts.csv", newline="") as file:
        return {row["part"]: row for row in csv.DictReader(file)}


def write_scores(folder: Path, p_values: list[list[float]]) -> dict[str, str]:
    """`scores.csv` of parts with these pictures, and the parts."""
    folder.mkdir(exist_ok=True)
    parts = {}
    with open(folder / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "score", "p_value", "verdict", "message", "file"))
        for i, own in enumerate(p_values):
            for j, p_value in enumerate(own):
                parts[f"/{i}/{j}"] = str(i)
                verdict = "normal" if p_value else "unreadable"
                writer.writerow((f"{i}/{j}", 1.0, f"{p_value:.6g}" if p_value else "", verdict, "", f"/{i}/{j}"))
    return parts


@pytest.mark.parametrize("dependence", [0.0, 0.7, 1.0])
def test_the_false_alarm_rate_holds_for_parts_however_their_pictures_depend(tmp_path, dependence):
    rng = np.random.default_rng(0)
    rate, num_good, pictures = 0.1, 99, 4
    shares = []
    for _ in range(20):
        good = rng.standard_normal(num_good)
        common, own = rng.standard_normal((200, 1)), rng.standard_normal((200, pictures))
        scores = np.sqrt(dependence) * common + np.sqrt(1.0 - dependence) * own
        p_values = (1 + (good >= scores[..., None]).sum(axis=2)) / (num_good + 1)
        counts = write_part_verdicts(tmp_path, write_scores(tmp_path, p_values.tolist()), rate)
        shares.append(counts["anomalous"] / 200)
    assert np.mean(shares) < rate + 3 * np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) > 0.01  # it finds something


def test_a_part_is_judged_by_its_least_p_value_and_all_of_its_pictures(tmp_path):
    parts = write_scores(tmp_path, [[0.5, 0.02, 0.9], [0.034, 0.5, 0.6], [0.4], [0.3, 0.0], [0.01, 0.0], [1 / 600] * 6])
    assert write_part_verdicts(tmp_path, parts, 0.1) == {"normal": 2, "anomalous": 3, "incomplete": 1}
    verdicts = read_verdicts(tmp_path)
    assert [row["verdict"] for row in verdicts.values()] == [
        *("anomalous", "normal", "normal"),
        *("incomplete", "anomalous", "anomalous"),
    ]
    assert [float(row["p_value"]) for row in verdicts.values()] == pytest.approx(
        [0.06, 0.102, 0.4, 0.6, 0.02, 0.01], rel=1e-4
    )
    assert verdicts["0"]["most_anomalous"] == "0/1"
    assert (verdicts["3"]["pictures"], verdicts["3"]["not_scored"]) == ("2", "1")
    # the last one's is the least that 599 good images give, and its six digits are rounded up
    assert write_part_verdicts(tmp_path, parts, 0.01)["anomalous"] == 1


def test_too_few_good_images_for_so_many_pictures_are_said_before_scoring(calibrated, tmp_path):
    folder = write_folder(tmp_path / "parts", 3)
    paths = find_images([folder])
    rows = [(f"parts/{path.name}", "a") for path in paths]
    two = read_parts(write_parts(tmp_path / "parts.csv", rows[:2]))
    assert check_parts(two, paths[:2], calibrated, None) == 0.1
    three = read_parts(write_parts(tmp_path / "parts.csv", rows))
    with pytest.raises(ValueError, match=r"'a' has 3 pictures, and 19 good images .* at least 29 good .* least 0\.15"):
        check_parts(three, paths, calibrated, None)
    with pytest.raises(ValueError, match=r"names no part for 1 images, .*002\.png first"):
        check_parts(two, paths, calibrated, None)
    with pytest.raises(ValueError, match="takes a calibrated pipeline"):
        check_parts(two, paths[:2], tiny_pipeline(), None)


def test_a_wrong_table_of_parts_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "parts", 1)
    monkeypatch.chdir(tmp_path)
    table = folder / "parts.csv"
    assert read_parts(write_parts(table, [("000.png", "a"), ("parts/000.png", "a")])) == {str(folder / "000.png"): "a"}
    for rows, message in (
        ([("none.png", "a")], r"line 2 of .* names 'none\.png', which is no file"),
        ([("000.png", " ")], "line 2 of .* names no part"),
        ([("000.png", "a"), ("000.png", "b")], "names two parts for 000.png"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_parts(write_parts(table, rows))
    table.write_text("file,part\n")
    with pytest.raises(ValueError, match="must have the columns image and part"):
        read_parts(table)
    table.write_text('image,part\n"' + 200_000 * "x")  # a quotation mark that nothing closes
    with pytest.raises(ValueError, match=r"`parts`: line 2 of .*parts\.csv is no CSV"):
        read_parts(table)
    table.write_text('image,part\n000.png,a\n000.png,"b\n001.png,c\n')  # so that the second part's name is all the rest
    with pytest.raises(ValueError, match=r"`parts`: line 3 of .*parts\.csv is no CSV"):
        read_parts(table)
    with pytest.raises(FileNotFoundError, match="`parts`: there is no file"):
        read_parts(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "content", ["image, part\n000.png, a\n", "Image,Part\n000.png,a\n", "part , IMAGE \na , 000.png \n"]
)
def test_a_table_of_parts_is_read_as_people_write_it(tmp_path, content):
    folder = write_folder(tmp_path / "parts", 1)
    (folder / "parts.csv").write_text(content)
    assert read_parts(folder / "parts.csv") == {str(folder / "000.png"): "a"}


def test_a_table_of_parts_without_commas_is_told_of_them(tmp_path):
    (tmp_path / "parts.csv").write_text("Image;Part\n000.png;a\n")
    with pytest.raises(ValueError, match="columns image and part, with a comma between them"):
        read_parts(tmp_path / "parts.csv")


def test_predict_judges_parts_and_goes_on(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path / "model")
    folder = write_folder(tmp_path / "parts", 3, first_seed=100)
    (folder / "broken.png").write_bytes(b"")
    names = [("000.png", "good"), ("001.png", "good"), ("002.png", "half"), ("broken.png", "half")]
    table = write_parts(folder / "parts.csv", names)
    command = ["predict", tmp_path / "model", folder, "--output", tmp_path / "out", "--parts", table, "--device", "cpu"]

    def run(*options: str) -> int:
        return CliRunner().invoke(app, [*map(str, command), *options], catch_exceptions=False).exit_code

    assert run() == 0
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        p_values = {Path(row["path"]).name: row["p_value"] for row in csv.DictReader(file)}
    verdicts = read_verdicts(tmp_path / "out")
    expected = min(1.0, 2 * min(float(p_values[name]) for name in ("000.png", "001.png")))
    assert float(verdicts["good"]["p_value"]) == pytest.approx(expected, rel=1e-5)
    assert verdicts["half"]["not_scored"] == "1"
    write_png(folder / "broken.png", np.zeros((16, 16, 3), np.uint8))  # no part looks like this
    alarms = [float(verdicts["good"]["p_value"]) <= 0.1]
    code = run("--fail-on-anomaly")
    verdicts = read_verdicts(tmp_path / "out")
    assert verdicts["half"]["not_scored"] == "0"
    alarms.append(verdicts["half"]["verdict"] == "anomalous")
    assert code == (3 if any(alarms) else 0)
    predict_files(calibrated, find_images([folder]), tmp_path / "plain")
    assert not (tmp_path / "plain" / "part_verdicts.csv").exists()
