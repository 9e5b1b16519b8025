"""Outputs in object stores: they are those of a local run, whatever becomes of requests and processes."""

from __future__ import annotations

import csv
import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from pathlib import Path

import pytest
from conftest import save_tiny_pipeline, textures, tiny_pipeline, write_folder
from launching import launch
from s3_store import s3_store
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline, cli
from diffad.predict import predict_files
from diffad.prediction import remote_output
from diffad.prediction.input_sources import find_inputs
from diffad.prediction.journal import COLUMNS, JOURNAL_COLUMNS, merged_journals
from diffad.reading import remote_files
from diffad.reading.inputs import find_images

fsspec = pytest.importorskip("fsspec")
NUM_IMAGES = 24


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(remote_files, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote_output, "SEGMENT_SECONDS", 0.0)  # so many segments as a long run has
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the store's own package would make requests again unseen


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(model):
    pipeline = AnomalyDenoisePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Images with alarms among them, the last of which cannot be read."""
    folder = write_folder(tmp_path_factory.mktemp("many") / "parts", NUM_IMAGES - 1)
    (folder / "999.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def local(pipeline, parts, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("local") / "found"
    predict_files(pipeline, find_images([parts]), output, batch_size=7)
    return output


@pytest.fixture
def faults():
    """What the store's proxy is to do with a request: the list's last entry decides."""
    return [lambda number, path: None]


@pytest.fixture
def store(monkeypatch, faults):
    with s3_store(monkeypatch, lambda number, path: faults[-1](number, path)) as opened:
        yield opened


@pytest.fixture
def memory() -> str:
    """A URL of a store in this process, where nothing is."""
    return f"memory://{uuid.uuid4()}/found"


def contents(url: str | Path, files=None) -> dict[str, bytes]:
    """All files of an output, by their place in it."""
    if isinstance(url, Path):
        found = {path.relative_to(url).as_posix(): path.read_bytes() for path in url.rglob("*") if path.is_file()}
        del found[".diffad.lock"]
        return found
    files = files or fsspec.core.url_to_fs(url)[0]
    path = files._strip_protocol(url)
    return {name[len(path) + 1 :]: files.cat_file(name) for name in files.find(path)}


def rows_of(url: str, files=None) -> list[dict[str, str]]:
    return list(csv.DictReader(contents(url, files)["scores.csv"].decode().splitlines()))


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def test_files_are_those_of_a_local_run_where_every_fiftieth_request_fails(
    pipeline, parts, local, store, faults, tmp_path, monkeypatch
):
    (files, bucket), spent, left = store, {}, []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def report(row: dict) -> None:
        left.extend(path for path in tmp_path.rglob("*.png") if path.name == row["picture"])

    faults.append(lambda number, path: "error" if number % 50 == 49 else None)
    url = f"s3://{bucket}/found"
    counts = predict_files(pipeline, find_images([parts]), url, batch_size=7, spent=spent, report=report)
    assert not left  # on the disk, of an image that has its row
    assert not list(tmp_path.iterdir())
    assert differing(contents(f"s3://{bucket}/found", files), contents(local)) == []
    assert counts["unreadable"] == 1
    assert counts["anomalous"] > 0  # so regions were compared
    assert spent["retried"] >= 2


KILLED = """
import os, signal, sys
from diffad import AnomalyDenoisePipeline
from diffad.prediction import remote_output
from diffad.reading.inputs import find_images
from diffad.predict import predict_files
remote_output.SEGMENT_SECONDS = 0.0
model, parts, output = sys.argv[1:]
seen = []
def report(row):
    seen.append(row)
    if len(seen) == 16:
        os.kill(os.getpid(), signal.SIGKILL)
predict_files(AnomalyDenoisePipeline.from_pretrained(model), find_images([parts]), output, 7, report=report)
"""


def test_after_a_kill_two_processes_go_on_from_another_folder(model, parts, local, store, tmp_path, tmp_path_factory):
    (files, bucket) = store
    url = f"s3://{bucket}/found"
    command = [sys.executable, "-c", KILLED, str(model), str(parts), url]
    temporary = str(tmp_path_factory.mktemp("temporary"))  # where a killed process leaves its folder
    killed = subprocess.run(command, capture_output=True, env={**os.environ, "TMPDIR": temporary})
    assert killed.returncode == -signal.SIGKILL
    assert "scores.csv" not in contents(url, files)
    told = launch("diffad.predict", model, parts, "--output", url, "--batch-size", 7, processes=2, cwd=tmp_path)
    done = int(told.split(" done before)")[0].rsplit("(", 1)[1])
    assert 7 <= done <= 16  # a segment for each batch of seven; the last one may not have come through
    assert differing(contents(url, files), contents(local)) == []
    assert list(tmp_path.iterdir()) == []  # no folder is called s3:


def test_wherever_a_run_breaks_off_the_next_one_goes_on(pipeline, store, faults, tmp_path):
    """The store answers so many requests and no more, as for a process that is killed there."""
    files, bucket = store
    parts = find_images([write_folder(tmp_path / "parts", 2, first_seed=5)])

    def run(output: str | Path, report=lambda row: None) -> int:
        return predict_files(pipeline, parts, output, batch_size=1, max_pictures=0, report=report)["skipped"]

    def stop(row: dict) -> None:
        raise RuntimeError("stopped")

    run(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        run(f"s3://{bucket}/begun", report=stop)
    for limit in itertools.count():
        files.copy(f"{bucket}/begun", f"{bucket}/found-{limit}", recursive=True)
        url, answered = f"s3://{bucket}/found-{limit}", itertools.count()
        faults.append(lambda number, path: "error" if next(answered) >= limit else None)  # noqa: B023 (until the pop)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote_files, "TRIES", 1)
            try:
                run(url)
                told = None
            except OSError as error:
                told = str(error)
        faults.pop()
        broken = contents(url, files)
        assert "scores.csv" not in broken or whole.items() <= broken.items()  # which says that all is there
        assert run(url) >= 1  # the row that was there at first is never lost
        assert differing(contents(url, files), whole) == [], limit
        if told is None:
            break
        assert url in told
    assert limit > 15


def test_rows_of_a_complete_table_stay_where_its_journal_cannot_be_removed(pipeline, store, faults, tmp_path):
    """A run takes up the journal, where there is one, and not the table beside it."""
    files, bucket = store
    url, seen = f"s3://{bucket}/found", []
    parts = find_images([write_folder(tmp_path / "parts", 2, first_seed=5)])

    def keeps_the_journal(number: int, path: str) -> str | None:
        if path.endswith("/scores.csv"):
            seen.append(path)
        return "error" if seen and path.endswith("/scores.partial.csv") else None

    faults.append(keeps_the_journal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_files, "TRIES", 1)
        with pytest.raises(OSError, match=r"scores.partial.csv cannot be removed"):
            predict_files(pipeline, parts, url, max_pictures=0)
    faults.pop()
    parts[1].unlink()
    predict_files(pipeline, parts[:1], url, max_pictures=0)
    assert [row["path"] for row in rows_of(url, files)] == [str(one) for one in parts]


def test_a_path_that_was_a_url_is_refused(pipeline, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is one"):
        predict_files(pipeline, find_images([parts])[:2], Path("s3://line/found"))
    assert not list(tmp_path.iterdir())


def test_a_picture_that_the_store_does_not_take_is_told_of_and_written_by_the_next_run(
    pipeline, parts, local, store, faults
):
    files, bucket = store
    url = f"s3://{bucket}/found"
    faults.append(lambda number, path: "error" if path.endswith("maps/003.png") else None)
    predict_files(pipeline, find_images([parts]), url, batch_size=7)
    told = [row["path"] for row in rows_of(url, files) if row["message"].startswith("Scored, but its pictures cannot")]
    assert told == [str(parts / "003.png")]
    faults.append(lambda number, path: None)
    assert predict_files(pipeline, find_images([parts]), url, batch_size=7)["skipped"] == NUM_IMAGES - 2
    pictures = {name: content for name, content in contents(local).items() if "/" in name}
    found = contents(url, files)
    assert differing({name: content for name, content in found.items() if "/" in name}, pictures) == []
    assert sorted(row["score"] for row in rows_of(url, files)) == sorted(
        row["score"] for row in csv.DictReader((local / "scores.csv").read_text().splitlines())
    )


def test_a_second_run_appends_what_is_new(pipeline, parts, memory, tmp_path):
    images = find_images([parts])
    for output in (memory, tmp_path / "local"):
        predict_files(pipeline, images[10:], output, batch_size=7)
        counts = predict_files(pipeline, images, output, batch_size=7)
        assert counts["skipped"] == NUM_IMAGES - 11  # but for the one that cannot be read
    assert differing(contents(memory), contents(tmp_path / "local")) == []
    assert len(rows_of(memory)) == NUM_IMAGES


def test_the_command_tells_drift_and_parts_and_takes_no_output_for_inputs(model, parts, store, tmp_path):
    files, bucket = store
    files.put(str(parts), f"{bucket}/parts", recursive=True)
    for _ in range(2):
        shown = CliRunner().invoke(
            cli.app, ["predict", str(model), f"s3://{bucket}/", "--output", f"s3://{bucket}/found/"]
        )
        assert shown.exit_code == 0, shown.output
        assert f"Scores: s3://{bucket}/found/scores.csv" in shown.output
        assert f"drift in {NUM_IMAGES - 1} parts" in shown.output
    assert f"({NUM_IMAGES - 1} done before)" in shown.output
    assert {row["path"] for row in rows_of(f"s3://{bucket}/found", files)} == {
        f"s3://{bucket}/parts/{path.name}" for path in parts.iterdir()
    }
    # to another output they are none either, and a picture of another program's beside them is one
    files.put(str(parts / "000.png"), f"{bucket}/overlays/000.png")
    found = [one.path for one in find_inputs([f"s3://{bucket}"], f"s3://{bucket}/other")]
    assert found == [f"s3://{bucket}/overlays/000.png"] + [
        f"s3://{bucket}/parts/{path.name}" for path in sorted(parts.iterdir())
    ]
    # one verdict a part
    table = tmp_path / "parts.csv"
    table.write_text("image,part\n" + "".join(f"{path},{path.stem}\n" for path in sorted(parts.glob("*.png"))))
    flags = ["--output", f"s3://{bucket}/of_parts", "--parts", str(table)]
    images = [str(path) for path in sorted(parts.glob("*.png"))]
    shown = CliRunner().invoke(cli.app, ["predict", str(model), *images, *flags])
    assert shown.exit_code == 0, shown.output
    verdicts = contents(f"s3://{bucket}/of_parts", files)["part_verdicts.csv"].decode().splitlines()
    assert len(verdicts) == NUM_IMAGES


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("overlays/mine.png", b"mine", "overlays exists, but {url} holds no results"),
        ("regions.csv", b"mine", "regions.csv exists, but {url} holds no results"),
        ("scores.csv", b"name,grade\nme,1\n", "{url}/scores.csv is no table of diffad's"),
        ("settings.json", b"{}", "{url}/settings.json is no file of diffad's"),
        ("", b"a file", "but {url} is a file"),
    ],
)
def test_what_another_program_has_written_is_refused(pipeline, parts, memory, name, content, told):
    files = fsspec.filesystem("memory")
    files.pipe_file(f"{memory}/{name}".rstrip("/"), content)
    before = files.find(memory)
    seen: list = []
    with pytest.raises(ValueError, match=told.format(url=memory)):
        predict_files(pipeline, find_images([parts]), memory, report=seen.append)
    assert not seen
    assert files.find(memory) == before
    assert files.cat_file(before[0]) == content


def test_results_of_another_calibration_are_not_mixed(pipeline, parts, memory):
    predict_files(pipeline, find_images([parts])[:3], memory)
    other = tiny_pipeline().calibrate(textures(12, first_seed=40), false_alarm_rate=0.25)
    with pytest.raises(ValueError, match=f"{memory} holds results of another calibration"):
        predict_files(other, find_images([parts])[:3], memory)


def failure(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit, match="1"):
        cli.main([str(one) for one in arguments])
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_written_to_is_told_of_before_a_model_is_loaded(parts, store, faults, capsys):
    files, bucket = store
    for url, *told in (
        ("https://example.com/found", "nothing can be written", "Give a folder"),
        ("nowhere://line/found", "no store that can be written to", "nowhere"),
        ("github://line/found", "no store that can be written to", "github"),
        ("s3://", "names no folder", "Give a bucket"),
        ("memory:///", "names no folder", "memory"),
        ("gs://line/found", "needs another package", "gcsfs"),
    ):
        said = failure(capsys, "predict", "no-model", parts, "--output", url)
        assert all(words in said for words in ("--output", url, *told)), said

    def ask_who_it_is_after(requests: str) -> None:
        request = urllib.request.Request(f"{files.endpoint_url}/moto-api/reset-auth", requests.encode(), method="POST")
        request.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(request).close()

    ask_who_it_is_after("0")
    try:
        said = failure(capsys, "predict", "no-model", parts, "--output", f"s3://{bucket}/found")
    finally:
        ask_who_it_is_after("Infinity")
    assert f"--output: s3://{bucket}/found cannot be read" in said
    assert "Access Key" in said


def test_a_bucket_that_is_missing_is_told_of_before_an_image_is_scored(pipeline, parts, store):
    seen: list = []
    with pytest.raises(OSError, match=r"s3://not-there-at-all/found/.* cannot be written .*bucket does not exist"):
        predict_files(pipeline, find_images([parts]), "s3://not-there-at-all/found", report=seen.append)
    assert not seen


def test_a_url_of_a_local_folder_is_that_folder(pipeline, parts, tmp_path):
    predict_files(pipeline, find_images([parts])[:3], f"file://{tmp_path}/found")
    assert (tmp_path / "found" / ".diffad.lock").is_file()  # as only a disk has one
    assert (tmp_path / "found" / "scores.csv").is_file()


def test_the_segments_of_days_are_merged_with_few_files_open(tmp_path):
    count = 1000
    for i in range(count):
        row = dict.fromkeys(COLUMNS, "") | {"place": i, "verdict": "normal"}
        with open(tmp_path / f"scores.partial-{i % 2}-abcdef01-{i // 2:06}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, JOURNAL_COLUMNS)
            writer.writeheader()
            writer.writerow(row)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 500), hard))
    try:
        assert [int(row[0]) for row in merged_journals(tmp_path)] == list(range(count))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
