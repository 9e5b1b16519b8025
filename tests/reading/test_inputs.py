"""What an input is, and the bookkeeping of `diffad predict`: every image once, inputs untouched, nothing elsewhere.

Long, as all are scored by one function that tells brightness.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import textures, write_folder, write_png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffad.prediction.detection_call import DetectionCall
from diffad.prediction.file_scoring import score_files
from diffad.prediction.manifest import Manifest
from diffad.prediction.remote_output import LocalOutput
from diffad.reading.inputs import find_images, images_below, is_image_name, subfolders


def brightness(images: list[torch.Tensor]) -> SimpleNamespace:
    """Detects what is bright."""
    maps = torch.from_numpy(np.stack(images)).mean(dim=3)  # (N, R, R)
    scores = maps.amax(dim=(1, 2))
    return SimpleNamespace(
        anomaly_map=maps,
        anomaly_score=scores,
        anomaly_mask=maps > 0.5,
        p_value=torch.zeros(len(images)),
        is_anomalous=scores > 0.5,
    )


def score(paths, output_dir, batch_size=16):
    call = DetectionCall(brightness, side=4, at_once=batch_size, threshold=0.5)
    return score_files(call, {"seed": 0}, paths, LocalOutput(output_dir), num_workers=1)


def read_scores(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scores.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with its bytes or its target."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [*files, *folders]:
            path = Path(place, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# -- what is found -------------------------------------------------------------------------------------------------


def test_links_are_followed_loops_noticed_and_each_file_counts_once(tmp_path):
    good = write_folder(tmp_path / "good", 3)
    camera = write_folder(tmp_path / "camera", 3, first_seed=9)
    (good / "cam2").symlink_to(camera)
    (good / "cam3").symlink_to(camera)  # the same again
    (camera / "back").symlink_to(good)
    (good / "self").symlink_to(good)
    (good / "zero.png").symlink_to(good / "000.png")
    (good / "alone.png").symlink_to(tmp_path / "single.bmp")
    Image.new("L", (2, 2)).save(tmp_path / "single.bmp")
    (good / "round.png").symlink_to(good / "round.png")
    with pytest.warns(UserWarning, match=r"lead to no file.*round\.png"):
        found = [path.relative_to(good).as_posix() for path in find_images([good])]
    assert found == ["000.png", "001.png", "002.png", "alone.png", "cam2/000.png", "cam2/001.png", "cam2/002.png"]
    with pytest.warns(UserWarning, match="lead to no file"):
        assert [path.relative_to(good).as_posix() for path in images_below(good)] == found  # training's, evaluate's


def test_two_spellings_of_a_folder_are_one(tmp_path, monkeypatch):
    parts = write_folder(tmp_path / "parts", 3)
    (tmp_path / "latest").symlink_to(parts)
    monkeypatch.chdir(tmp_path)
    spellings = ["parts", parts, "latest", "parts/../parts", parts / "001.png", "latest/002.png"]
    assert find_images(spellings) == [Path("parts", f"00{i}.png") for i in range(3)]
    # and between runs
    assert score(find_images(["parts"]), "out")["skipped"] == 0
    for spelling in spellings:
        assert score(find_images([spelling]), "out")["skipped"] == (3 if Path(spelling).is_dir() else 1)
    assert len(read_scores(Path("out"))) == 3


def test_a_run_goes_on_under_another_spelling(tmp_path, monkeypatch):
    parts = write_folder(tmp_path / "parts", 1)
    (tmp_path / "latest").symlink_to(parts)
    monkeypatch.chdir(tmp_path)
    for spelling, count in (("latest", 1), ("parts", 2), ("latest", 3)):
        write_folder(parts, count)
        score(find_images([spelling]), "out")
    assert [row["picture"] for row in read_scores(Path("out"))] == ["000.png", "001.png", "002.png"]


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash", "$RECYCLE.BIN"])
def test_hidden_and_service_folders_hold_no_inputs(name, tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    write_folder(parts / name, 2)
    write_png(parts / "._000.png", textures(1)[0])
    (parts / "Thumbs.db").write_bytes(b"x")
    assert [path.name for path in find_images([parts])] == ["000.png", "001.png"]
    assert images_below(parts) == find_images([parts])
    assert subfolders(parts) == []
    assert len(find_images([parts / name])) == 2  # named outright


def test_whatever_pillow_reads_is_an_image(tmp_path):
    for name in ("a.jfif", "a.gif", "a.jp2", "a.JPG", "a.jpe", "a.ppm", "a.avif", "a.TIF"):
        assert is_image_name(name), name
    for name in ("a.pdf", "a.txt", "a.csv", "a.eps", "a.ico", "a", ".a.png", "Thumbs.db"):
        assert not is_image_name(name), name
    picture = Image.fromarray(textures(1)[0])
    picture.save(tmp_path / "a.jfif", format="JPEG")
    picture.save(tmp_path / "b.gif")
    counts = score(find_images([tmp_path]), tmp_path / "out")
    assert counts["normal"] + counts["anomalous"] == 2


def test_what_was_written_before_is_no_input_of_any_command(tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    for name in ("found", "."):  # below the inputs, and between them
        score(find_images([parts], parts / name), parts / name)
        assert [path.name for path in find_images([parts], parts / name)] == ["000.png", "001.png"]
        assert images_below(parts) == find_images([parts])
    model = parts / "model"
    write_png(model / "validation" / "step-10.png", textures(1)[0])
    write_png(model / "good-1.png", textures(1)[0])
    (model / "checkpoint-10").mkdir()
    assert len(images_below(parts)) == 2
    assert subfolders(parts) == []


def test_annotations_hide_no_images_and_the_record_of_an_autoencoder_does(tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    write_folder(parts / "validation", 1)
    (parts / "training.json").write_text('{"images": []}')  # in COCO's format
    assert len(images_below(parts)) == 3
    (parts / "config.json").write_text("{}")
    assert images_below(parts) == []


def test_the_pictures_of_a_report_are_no_inputs_beside_it(tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    for name in ("report-good.png", "report-defective.png"):
        write_png(parts / name, textures(1)[0])
    assert len(images_below(parts)) == 4  # another program's
    for name in ("report.json", "report.html"):
        (parts / name).write_text("{}")
    write_png(parts / "part-good.png", textures(1)[0])
    assert [path.name for path in find_images([parts])] == ["000.png", "001.png", "part-good.png"]
    assert images_below(parts) == find_images([parts])
    reports = tmp_path / "reports"
    write_png(reports / "line-good.png", textures(1)[0])
    for name in ("line.json", "line.html"):
        (reports / name).write_text("{}")
    assert subfolders(tmp_path) == [parts]


def test_an_output_above_the_inputs_hides_none(tmp_path):
    today = write_folder(tmp_path / "line" / "today", 2)
    for skipped in (0, 2):
        assert score(find_images([today], tmp_path / "line"), tmp_path / "line")["skipped"] == skipped
    with pytest.raises(ValueError, match=r"no images.*earlier run does not count"):
        find_images([tmp_path / "line" / "overlays"], tmp_path / "line")


# -- what is written -----------------------------------------------------------------------------------------------


def test_no_input_is_written_to_wherever_the_paths_lead(tmp_path, monkeypatch):
    today = tmp_path / "line" / "today"
    write_folder(today / "monday", 2)
    write_folder(tmp_path / "archive" / "tuesday", 2, first_seed=5)
    before = contents(tmp_path)
    monkeypatch.chdir(today)
    score(find_images(["monday", "../../archive/tuesday"], "../../results"), "../../results")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert all(path.startswith(str(tmp_path / "results")) for path in after.keys() - before.keys())
    assert len(list((tmp_path / "results" / "overlays").rglob("*.png"))) == 4


def test_inputs_and_pictures_may_share_a_folder_but_not_names(tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    write_folder(parts / "maps", 1, first_seed=7)  # the user's own
    before = contents(parts)
    with pytest.raises(ValueError, match=r"maps exists.*it would be written to.*`output_dir`"):
        score(find_images([parts], parts), parts)
    assert contents(parts) == before
    (parts / "scores.csv").write_text("name,points\nalice,3\n")
    shutil.rmtree(parts / "maps")
    with pytest.raises(ValueError, match=r"scores\.csv is no table of diffad's"):
        score(find_images([parts], parts), parts)
    assert (parts / "scores.csv").read_text() == "name,points\nalice,3\n"


def test_links_in_the_output_lead_nothing_out_of_it(tmp_path):
    parts, out = write_folder(tmp_path / "parts", 2), tmp_path / "out"
    write_png(parts / "sub" / "a.png", textures(1)[0])
    before = contents(parts)
    score([parts / "000.png"], out)
    (out / "overlays" / "sub").symlink_to(parts / "sub")
    counts = score(find_images([parts]), out)
    assert sum(counts[verdict] for verdict in ("normal", "anomalous")) == 3
    assert contents(parts) == before
    assert ["link" in row["message"] for row in read_scores(out)] == [False, False, True]
    (out / "overlays" / "sub").unlink()
    score(find_images([parts]), out)  # tried again
    assert not any(row["message"] for row in read_scores(out))
    (out / "masks" / "000.png").unlink()
    shutil.rmtree(out / "maps")
    (out / "maps").symlink_to(parts)
    with pytest.raises(ValueError, match="maps is a link"):
        score(find_images([parts]), out)


def test_equal_stems_have_pictures_of_their_own(tmp_path):
    parts = tmp_path / "parts"
    picture = Image.fromarray(textures(1)[0])
    parts.mkdir()
    for name in ("a.jpg", "a.jpg.png", "a.png", "a.PNG", "A.png", "a.PNG.png", "plain", "plain.png"):
        picture.save(parts / name, format="PNG")
    (parts / "b.jpg.png").mkdir()
    picture.save(parts / "b.jpg")
    picture.save(parts / "b.jpg.png" / "c.png")
    score(find_images([parts, parts / "plain"]), tmp_path / "out")
    rows = read_scores(tmp_path / "out")
    assert len(rows) == 10
    assert len({row["picture"].casefold() for row in rows}) == 10
    assert all((tmp_path / "out" / kind / row["picture"]).is_file() for row in rows for kind in ("maps", "overlays"))
    assert not any(row["message"] for row in rows)


def test_long_names_and_names_that_are_no_text(tmp_path):
    parts = tmp_path / "parts"
    names = [
        "x" * 251 + ".png",
        "x" * 250 + "y.png",
        "x" * 240 + ".jpg",
        "ü" * 120 + ".png",
        os.fsdecode(b"\xff\xfe.png"),
    ]
    parts.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(textures(1, first_seed=i)[0]).save(parts / name, format="PNG")
    for skipped in (0, 5):
        assert score(find_images([parts]), tmp_path / "out")["skipped"] == skipped
    rows = read_scores(tmp_path / "out")
    assert {Path(row["path"]).name for row in rows} == set(names)
    assert not any(row["message"] for row in rows)
    assert len({row["picture"] for row in rows}) == 5
    assert all((tmp_path / "out" / "maps" / row["picture"]).is_file() for row in rows)


def test_a_picture_that_cannot_be_written_is_a_message_and_the_rest_goes_on(tmp_path):
    parts, out = write_folder(tmp_path / "parts", 3), tmp_path / "out"
    score([parts / "000.png"], out)
    (out / "maps" / "001.png").mkdir()
    score(find_images([parts]), out)
    rows = read_scores(out)
    assert [bool(row["message"]) for row in rows] == [False, True, False]
    assert rows[1]["score"]  # it was scored
    (out / "maps" / "001.png").rmdir()
    assert score(find_images([parts]), out)["skipped"] == 2
    assert not any(row["message"] for row in read_scores(out))


def test_a_file_that_was_replaced_is_scored_again(tmp_path):
    parts, out = tmp_path / "parts", tmp_path / "out"
    write_png(parts / "a.png", np.zeros((8, 8, 3), np.uint8))
    assert score(find_images([parts]), out)["normal"] == 1
    write_png(parts / "a.png", np.full((8, 8, 3), 255, np.uint8))
    counts = score(find_images([parts]), out)
    assert (counts["anomalous"], counts["normal"], counts["skipped"]) == (1, 0, 0)
    assert [row["verdict"] for row in read_scores(out)] == ["anomalous"]
    assert score(find_images([parts]), out)["skipped"] == 1


def test_a_file_that_a_manifest_names_and_that_was_replaced_is_scored_again(tmp_path):
    parts, out = tmp_path / "parts", tmp_path / "out"
    for name in ("a", "b", "c"):
        write_png(parts / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "manifest.csv").write_text("path\nparts/a.png\nparts/b.png\nparts/c.png\n")
    assert score(Manifest(tmp_path / "manifest.csv"), out)["normal"] == 3
    write_png(parts / "b.png", np.full((8, 8, 3), 255, np.uint8))
    (parts / "c.png").unlink()  # its row stays
    counts = score(Manifest(tmp_path / "manifest.csv"), out)
    assert (counts["anomalous"], counts["normal"], counts["skipped"]) == (1, 2, 2)
    assert [row["verdict"] for row in read_scores(out)] == ["normal", "anomalous", "normal"]
    assert score(Manifest(tmp_path / "manifest.csv"), out)["skipped"] == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_second_process_is_told_who_writes(tmp_path):
    parts, out = write_folder(tmp_path / "parts", 2), tmp_path / "out"
    holder = (  # with a process of its own that outlives it, as one that reads images ahead does for seconds
        "import os, sys, time; from pathlib import Path; from diffad.files import locked_folder\n"
        "with locked_folder(Path(sys.argv[1]), '.diffad.lock'):\n"
        "    if not os.fork(): print('held', flush=True)\n"
        "    time.sleep(600)"
    )
    out.mkdir()
    command = [sys.executable, "-c", holder, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=rf"written to by process {process.pid} on .*another `output_dir`"):
            score(find_images([parts]), out)
        assert not (out / "scores.csv").exists()
        process.kill()
        process.wait()
        assert score(find_images([parts]), out)["skipped"] == 0  # the dead hold nothing
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(read_scores(out)) == 2


# -- any tree ------------------------------------------------------------------------------------------------------

PIXELS = [np.full((3, 4, 3), value, np.uint8) for value in (0, 90, 200)]
STEMS = st.sampled_from(
    [
        b"a",
        b"A",
        b"a.jpg",
        b"\xc3\xa9",
        b"e\xcc\x81",
        b"\xff\xfe",
        b"-x",
        b" ",
        b"a\nb",
        b"n" * 246,
        b".hid",
        b"con",
        b"%s",
    ]
)
SUFFIXES = st.sampled_from([b".png", b".PNG", b".jpg", b".gif", b".txt", b""])
FOLDERS = st.sampled_from(
    [b"good", b"Good", b".git", b"@eaDir", b"__MACOSX", b"maps", b"\xfe\xfe", b"m" * 250, b"a.png"]
)
STEPS = st.lists(
    st.tuples(
        st.lists(FOLDERS, max_size=2),
        st.sampled_from(["image", "image", "image", "broken", "link", "folder link", "hidden"]),
        STEMS,
        SUFFIXES,
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=14,
)


def grow(root: bytes, steps: list) -> None:
    """A tree of images, links to what is there already or to folders above, and files that are none."""
    made = [root]
    for folders, kind, stem, suffix, number in steps:
        folder = os.path.join(root, *folders)
        path = os.path.join(folder, stem + suffix)
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:
            continue  # a file stands there
        if os.path.lexists(path):
            continue
        if kind == "image":
            with open(path, "wb") as file:
                Image.fromarray(PIXELS[number % 3]).save(file, format="PNG")
        elif kind in ("link", "folder link"):
            os.symlink(os.path.relpath(made[number % len(made)], folder), path)
        else:
            with open(path, "wb") as file:
                file.write(b"no image")
        made += [path, folder]


def expected_files(root: bytes) -> set[bytes]:
    """By the resolved names of what a reader of the rule would count; links to folders are followed to any depth."""
    found, waiting, seen = set(), [root], set()
    while waiting:
        folder = os.path.realpath(waiting.pop())
        if folder in seen:
            continue
        seen.add(folder)
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.startswith(b"."):
                continue
            if os.path.isdir(path):
                if name.lower() not in (b"@eadir", b"__macosx"):
                    waiting.append(path)
            elif os.path.isfile(path) and os.path.splitext(name)[1].lower() in (b".png", b".jpg", b".gif"):
                found.add(os.path.realpath(path))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS, st.sampled_from(["out", "tree/out", "tree", "tree/good/../../other/out"]), st.integers(0, 3))
@pytest.mark.filterwarnings("ignore")
def test_in_any_tree_every_image_counts_once_and_nothing_else_changes(steps, output, spelling):
    base = Path(tempfile.mkdtemp())
    here = Path.cwd()
    try:
        tree = base / "tree"
        (tree / "good").mkdir(parents=True)
        grow(os.fsencode(tree), steps)
        (base / "alias").symlink_to(tree)
        os.chdir(base)
        before, expected = contents(base), expected_files(os.fsencode(tree))
        given_paths = [["tree"], [tree, "alias"], ["alias", "tree/../tree"], ["tree/good/..", str(tree)]][spelling]
        try:
            paths = find_images(given_paths, output)
        except ValueError:
            assert not expected
            return
        try:
            for again in (False, True):
                counts = score(find_images(given_paths, output), output, batch_size=3)
                assert sum(counts.values()) - counts["skipped"] == len(expected)
                assert not again or counts["skipped"] == len(expected) - counts["unreadable"]
        except ValueError as error:  # the user's own folder `maps` stands where pictures would go
            if output != "tree":
                raise error
            assert contents(base) == before
            return
        rows = read_scores(Path(output))
        assert sorted(os.path.realpath(os.fsencode(row["path"])) for row in rows) == sorted(expected)
        assert len(paths) == len(rows)
        assert len({row["picture"] for row in rows if row["picture"]}) == sum(bool(row["score"]) for row in rows)
        assert not [row for row in rows if row["score"] and row["message"]]
        after = contents(base)
        assert {path: after[path] for path in before} == before
        inside = os.path.realpath(output) + os.sep
        assert all(os.path.realpath(path).startswith(inside) for path in after.keys() - before.keys())
    finally:
        os.chdir(here)
        shutil.rmtree(os.fsencode(base))
