"""Inputs in object stores and on the web: every image accounted for, whatever becomes of its requests."""

from __future__ import annotations

import csv
import functools
import http.server
import io
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
from conftest import textures, tiny_pipeline, write_folder, write_png
from faulty_proxy import faulty_proxy
from s3_store import s3_store
from typer.testing import CliRunner

from diffad.cli import app
from diffad.predict import predict_files
from diffad.prediction.input_sources import find_inputs
from diffad.prediction.manifest import Manifest
from diffad.reading import remote_files, remote_reader
from diffad.reading.input_file import Input, common_folder, place_below
from diffad.reading.inputs import find_images
from diffad.training import fit

pytest.importorskip("aiohttp")
fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.local import LocalFileSystem  # noqa: E402
from fsspec.utils import infer_storage_options  # noqa: E402

NUM_IMAGES = 50


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote_files, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    return pipeline


@pytest.fixture
def parts(tmp_path) -> Path:
    return write_folder(tmp_path / "parts", NUM_IMAGES)


@pytest.fixture
def web(tmp_path):
    """The address of a server of `tmp_path`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *what: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def scores(folder: Path) -> list[str]:
    return [row["score"] for row in rows_of(folder)]


def manifest_of(folder: Path, address: str) -> Manifest:
    path = folder / "manifest.csv"
    path.write_text("url\n" + "".join(f"{address}/parts/{i:03}.png\n" for i in range(NUM_IMAGES)))
    return Manifest(path)


def test_errors_slow_answers_and_none_cost_time_and_no_image(pipeline, parts, web, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files, "TIMEOUT", 1.0)
    predict_files(pipeline, find_images([parts]), tmp_path / "local", batch_size=8)
    kinds = {21: "silent", 25: "slow", **dict.fromkeys(range(10, 50, 4), "error")}
    spent: dict[str, float] = {}
    with faulty_proxy(web, lambda number, path: kinds.get(number)) as address:
        counts = predict_files(pipeline, manifest_of(tmp_path, address), tmp_path / "far", batch_size=8, spent=spent)
    assert counts["unreadable"] == 0
    assert scores(tmp_path / "far") == scores(tmp_path / "local")
    assert spent["retried"] == 11  # all but the slow one


def test_what_fails_for_good_is_a_row_and_the_next_run_completes(pipeline, parts, web, tmp_path):
    broken = [True]

    def fault(number: int, path: str) -> str | None:
        return "error" if broken[0] and path == "/parts/017.png" else None  # 2% of the images

    with faulty_proxy(web, fault) as address:
        manifest = manifest_of(tmp_path, address)
        counts = predict_files(pipeline, manifest, tmp_path / "far", batch_size=8)
        rows = rows_of(tmp_path / "far")
        assert len(rows) == NUM_IMAGES
        assert counts["unreadable"] == 1
        assert [row["file"] for row in rows if not row["score"]] == [f"{address}/parts/017.png"]
        assert f"{remote_files.TRIES} requests failed" in rows[17]["message"]
        broken[0] = False
        counts = predict_files(pipeline, Manifest(tmp_path / "manifest.csv"), tmp_path / "far", batch_size=8)
    assert (counts["skipped"], counts["unreadable"]) == (NUM_IMAGES - 1, 0)
    predict_files(pipeline, find_images([parts]), tmp_path / "local", batch_size=8)
    assert scores(tmp_path / "far") == scores(tmp_path / "local")


def test_a_listing_that_fails_is_asked_for_again(parts, web):
    asked: set[str] = set()

    def first_of_each(number: int, path: str) -> str | None:
        return None if path in asked else asked.add(path) or "error"

    with faulty_proxy(web, first_of_each) as address:
        found = find_inputs([f"{address}/parts"])
        assert [one.path for one in found] == [f"{address}/parts/{i:03}.png" for i in range(NUM_IMAGES)]


def test_a_far_table_or_tar_that_fails_is_asked_for_again(parts, web, tmp_path):
    (tmp_path / "m.csv").write_text("path\nparts/000.png\n")
    write_tar(tmp_path / "t.tar", sorted(parts.iterdir())[:1])
    for name in ("m.csv", "t.tar"):
        with faulty_proxy(web, lambda number, path: "error" if number < 4 else None) as address:
            (one,) = find_inputs([f"{address}/{name}"]).first(9)
            assert one.path.endswith("000.png")


def test_a_server_that_is_not_there_holds_no_empty_folder(parts, web, tmp_path):
    for url in ("http://127.0.0.1:1/parts", "http://127.0.0.1:1/parts/000.png"):
        with pytest.raises(OSError, match=f"`images`: {url} cannot be listed .*onnect"):
            find_inputs([url])
    for url in (f"{web}/none", f"{web}/parts/none.png"):
        with pytest.raises(FileNotFoundError, match=f"`images`: there is no file or folder at {url}"):
            find_inputs([url])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"There are no images .*/empty"):
        find_inputs([f"{web}/empty"])


@pytest.fixture
def store(parts, monkeypatch):
    """S3, and its bucket with the parts, behind a proxy of which every tenth request fails."""
    with s3_store(monkeypatch, lambda number, path: "error" if number % 10 == 9 else None) as (files, bucket):
        files.put(str(parts), f"{bucket}/parts", recursive=True)
        files.touch(f"{bucket}/parts/@eaDir/000.png")  # what other programs leave behind
        yield files, bucket


def test_a_bucket_is_as_a_folder(pipeline, parts, store, tmp_path):
    predict_files(pipeline, find_images([parts]), tmp_path / "local", batch_size=8)
    files, bucket = store
    found = find_inputs([f"s3://{bucket}/parts"])
    assert predict_files(pipeline, found, tmp_path / "far", batch_size=8)["unreadable"] == 0
    assert scores(tmp_path / "far") == scores(tmp_path / "local")
    rows = rows_of(tmp_path / "far")
    assert [row["path"] for row in rows] == [f"s3://{bucket}/parts/{i:03}.png" for i in range(NUM_IMAGES)]
    assert [row["picture"] for row in rows] == [row["picture"] for row in rows_of(tmp_path / "local")]
    # what has been replaced is scored again, and nothing else
    write_png(tmp_path / "other.png", textures(1, first_seed=99)[0])
    files.put(str(tmp_path / "other.png"), f"{bucket}/parts/001.png")
    seen: list = []
    predict_files(pipeline, find_inputs([f"s3://{bucket}/parts"]), tmp_path / "far", batch_size=8, report=seen.append)
    assert [row["path"] for row in seen] == [f"s3://{bucket}/parts/001.png"]
    with pytest.raises(ValueError, match=r"no images.*s3://line-.*/none"):
        find_inputs([f"s3://{bucket}/none"])
    with pytest.raises(FileNotFoundError, match=r"there is no file at s3://line-.*/none\.png"):
        find_inputs([f"s3://{bucket}/none.png"])


def test_a_manifest_in_a_bucket_names_what_lies_beside_it(pipeline, parts, store, tmp_path):
    files, bucket = store
    files.pipe(f"{bucket}/m.csv", f"path\nparts/000.png\ns3://{bucket}/parts/001.png\nparts/none.png\n".encode())
    counts = predict_files(pipeline, find_inputs([f"s3://{bucket}/m.csv"]), tmp_path / "far", batch_size=8)
    rows = rows_of(tmp_path / "far")
    assert [row["path"] for row in rows][:2] == [f"s3://{bucket}/parts/00{i}.png" for i in range(2)]
    assert [bool(row["score"]) for row in rows] == [True, True, False]
    assert f"no file at s3://{bucket}/parts/none.png" in rows[2]["message"]
    assert counts["unreadable"] == 1


def test_a_folder_by_its_url_is_read_where_it_lies(tmp_path, monkeypatch):
    """And not below the working folder."""
    parts = write_folder(tmp_path / "parts", 2)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / str(parts)[1:], 2, first_seed=9)
    for url in (f"file://{parts}", f"file://{parts}/", "file://parts", f"file://{parts}/000.png"):
        found = find_inputs([url])
        assert len(found) == (1 if url.endswith(".png") else 2)
        assert found[0].path == url.removesuffix("/000.png").rstrip("/") + "/000.png"
        assert remote_reader.RemoteReader()(found[0]) == (parts / "000.png").read_bytes()
    parquet = write_folder(tmp_path / "set", 1) / "0.parquet"
    parquet.touch()
    assert remote_files.list_parquet(f"file://{tmp_path}/set") == [f"file://{parquet}"]


class HostFiles(LocalFileSystem):
    """As sftp and others: the host is of the connection, and no path has it."""

    protocol = "hostfiles"

    def __init__(self, host: str | None = None, **more):
        super().__init__(**more)
        assert host == "line7"

    @classmethod
    def _strip_protocol(cls, path):
        return infer_storage_options(path)["path"]

    @staticmethod
    def _get_kwargs_from_urls(path):
        return {"host": infer_storage_options(path)["host"]}


def test_a_folder_of_a_host_keeps_its_host(tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    fsspec.register_implementation("hostfiles", HostFiles, clobber=True)
    found = find_inputs([f"hostfiles://line7{parts}"])
    assert [one.path for one in found] == [f"hostfiles://line7{parts}/{i:03}.png" for i in range(2)]
    assert remote_reader.RemoteReader()(found[0]) == (parts / "000.png").read_bytes()
    assert place_below(common_folder(found), found[1].path) == Path("001.png")


def test_a_folder_of_a_cached_store_is_listed(tmp_path):
    parts = write_folder(tmp_path / "parts", 2)
    found = find_inputs([f"simplecache::file://{parts}"])
    assert [one.path for one in found] == [f"simplecache::file://{parts}/{i:03}.png" for i in range(2)]
    assert remote_reader.RemoteReader()(found[0]) == (parts / "000.png").read_bytes()


def test_a_folder_in_an_archive_is_told_to_come_as_a_manifest(tmp_path):
    archive = shutil.make_archive(str(tmp_path / "parts"), "zip", write_folder(tmp_path / "parts", 1))
    for url in (f"zip://::{archive}", f"zip://000.png::{archive}"):
        with pytest.raises(ValueError, match=r"`images`: zip://.* is a chain of URLs.*Give a manifest"):
            find_inputs([url])
    (tmp_path / "manifest.csv").write_text(f"zip://000.png::{archive}\n")
    (one,) = find_inputs([tmp_path / "manifest.csv"]).first(1)
    assert remote_reader.RemoteReader()(one) == (tmp_path / "parts" / "000.png").read_bytes()


def test_a_url_is_no_model_folder_and_makes_no_folder_of_its_name(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["fit", str(parts), "--output", "s3://line/model"])
    assert "Only `diffad predict` writes to a URL" in str(refused.exception)
    with pytest.raises(SystemExit, match="2"):
        fit.main(["--train_data_dir", str(parts), "--output_dir", "s3://line/model"])
    assert "--output_dir: Only `diffad predict` writes to a URL, given as text, and s3://line/model is one" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "s3:").exists()


def test_the_first_images_of_a_manifest_are_those_that_lines_name(tmp_path):
    """They tell the range of values: of lines without an image nothing can be told."""
    table = tmp_path / "parts.csv"
    table.write_text("path,label\n" + ",good\n" * 200 + "a.png,good\n")
    assert [one.file for one in Manifest(table).first(1)] == ["a.png"]


def test_images_of_two_buckets_keep_their_places():
    files = [Input(url, url, "", "") for url in ("s3://a/x/1.png", "s3://b/2.png")]
    root = common_folder(files)
    assert [place_below(root, one.path).as_posix() for one in files] == ["a/x/1.png", "b/2.png"]


def write_tar(path: Path, files: list[Path]) -> Path:
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, file.name)
            content = b'{"label": 0}'  # what goes with a sample
            (entry := tarfile.TarInfo(file.stem + ".json")).size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("where", ["local", "far"])
def test_tars_hold_the_same_images(pipeline, parts, tmp_path, where, request):
    files = sorted(parts.iterdir())
    (folder := tmp_path / "new parts, größer").mkdir()  # a URL would write that in another way
    tars = [write_tar(folder / f"{i}.tar", files[start:end]) for i, start, end in ((0, 0, 30), (1, 30, None))]
    predict_files(pipeline, files, tmp_path / "folder", batch_size=8)
    if where == "far":
        store, bucket = request.getfixturevalue("store")
        for tar in tars:
            store.put(str(tar), f"{bucket}/{tar.name}")
        tars = [f"s3://{bucket}/{tar.name}" for tar in tars]
    counts = predict_files(pipeline, find_inputs(tars), tmp_path / "out", batch_size=8)
    assert counts["unreadable"] == 0
    assert [row["path"].rsplit("/", 1)[1] for row in rows_of(tmp_path / "out")] == [file.name for file in files]
    assert scores(tmp_path / "out") == scores(tmp_path / "folder")
    assert predict_files(pipeline, find_inputs(tars), tmp_path / "out", batch_size=8)["skipped"] == NUM_IMAGES


def test_parquet_files_hold_the_same_images(pipeline, parts, store, tmp_path):
    """As a data set on the Hub has them, in two files of several groups of rows."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(parts.iterdir())
    for i, start, end in ((0, 0, 30), (1, 30, None)):
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files[start:end]]
        table = pa.table({"label": [0] * len(images), "image": images})
        parquet.write_table(table, tmp_path / f"{i}.parquet", row_group_size=7)
        store[0].put(str(tmp_path / f"{i}.parquet"), f"{store[1]}/set/data/{i}.parquet")
    predict_files(pipeline, files, tmp_path / "folder", batch_size=8)
    for name, inputs in (("local", sorted(tmp_path.glob("*.parquet"))), ("far", [f"s3://{store[1]}/set"])):
        assert predict_files(pipeline, find_inputs(inputs), tmp_path / name, batch_size=8)["unreadable"] == 0
        assert [row["path"].rsplit("/", 1)[1] for row in rows_of(tmp_path / name)] == [file.name for file in files]
        assert scores(tmp_path / name) == scores(tmp_path / "folder")
