"""Manifests, tars and parquet files as people and other programs write them: each image once, or a word on why not."""

from __future__ import annotations

import logging
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import write_folder

from diffad.prediction.input_sources import find_inputs
from diffad.reading import remote_files
from diffad.reading.grey_depth import UnreadableImageError
from diffad.reading.remote_reader import RemoteReader
from diffad.warn_once import warn_once


@pytest.fixture
def parts(tmp_path) -> Path:
    return write_folder(tmp_path / "in", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path;label\nin/000.png;good\n", "first line of .*'path;label'.*commas"),
        (b"in/000.png;good\nin/001.png;good\n", "first line of .*commas"),
        (b"id,filename\n0,in/000.png\n", "'id,filename', has none of the columns path, image"),
        ("path\nin/000.png\n".encode("utf-16"), "first line of .*UTF-8"),
        (b'path\n"in/000.png\n' + b"in/001.png\n" * 15_000, "line 2 of .*manifest.csv is no CSV"),
        (b'path\nin/000.png\n"in/001.png\nin/000.png\n', "line 3 of .*manifest.csv is no CSV.*quotation mark"),
        (b'path,label\n"in/000.png,good\n"in/001.png",good\n', "line 2 of .*manifest.csv is no CSV"),
    ],
)
def test_a_table_that_names_no_images_is_told_before_any_is_scored(parts, tmp_path, content, message):
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"`images`: .*{message}"):
        list(find_inputs([tmp_path / "manifest.csv"]).entries())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="csv takes no NUL")
def test_a_name_that_no_file_can_have_is_a_row(parts, tmp_path):
    (tmp_path / "manifest.csv").write_text("path\nin/\0.png\nin/000.png\n")
    found = find_inputs([tmp_path / "manifest.csv"]).first(2)
    assert [bool(one.size) for one in found] == [False, True]


@pytest.mark.parametrize("content", ["in/000.png,good\nin/001.png,good\n", "in/000,good\nin/001.png,good\n"])
def test_a_table_without_a_header_begins_with_an_image_whatever_its_name(parts, tmp_path, content):
    (parts / "000.png").rename(parts / content.split(",")[0].split("/")[1])
    (tmp_path / "manifest.csv").write_text(content)
    found = find_inputs([tmp_path / "manifest.csv"])
    assert [one.path.is_file() for one in found.first(9)] == [True, True]


@pytest.mark.parametrize("content", ["id, path\n0, in/000.png\n1, in/001.png \n", "in/000.png \nin/001.png\n"])
def test_spaces_around_the_fields_of_a_table_are_not_of_the_names(parts, tmp_path, content):
    (tmp_path / "manifest.csv").write_text(content)
    found = find_inputs([tmp_path / "manifest.csv"])
    assert list(found.entries()) == ["in/000.png", "in/001.png"]
    assert [one.path for one in found.first(9)] == [parts / "000.png", parts / "001.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="names there do not end in spaces")
def test_a_space_that_is_of_a_name_stays(parts, tmp_path):
    (parts / "000.png").rename(parts / "000.png ")
    (tmp_path / "manifest.csv").write_text("path\nin/000.png \n")
    assert list(find_inputs([tmp_path / "manifest.csv"]).entries()) == ["in/000.png "]


def test_a_parquet_manifest_names_its_column_in_any_case(parts, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("fsspec")
    parquet.write_table(pa.table({"id": [0], "Path": ["in/000.png"]}), tmp_path / "parts.parquet")
    assert list(find_inputs([tmp_path / "parts.parquet"]).entries()) == ["in/000.png"]


@pytest.mark.parametrize("name", ["parts.txt", "parts.JSON", "parts.jsonl", "parts.tsv", "parts.xlsx"])
def test_a_list_of_another_format_is_told_what_a_manifest_is(parts, tmp_path, name):
    (tmp_path / name).write_text("in/000.png\n")
    with pytest.raises(ValueError, match=f"`images`: .*{name} is no image.* a manifest is a CSV or parquet file"):
        find_inputs([tmp_path / name])
    with pytest.raises(FileNotFoundError):
        find_inputs([tmp_path / "missing.txt"])


@pytest.mark.parametrize(("columns", "taken"), [(("mask", "Image"), 1), (("IMAGE", "image"), 1), (("picture",), 0)])
def test_of_several_columns_of_images_the_one_called_image_is_taken(parts, tmp_path, columns, taken):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("fsspec")
    contents = [(parts / f"{i:03}.png").read_bytes() for i in range(len(columns))]
    images = {name: [{"bytes": content, "path": name}] for name, content in zip(columns, contents, strict=True)}
    parquet.write_table(pa.table(images), tmp_path / "parts.parquet")
    (one,) = find_inputs([tmp_path / "parts.parquet"]).first(9)
    assert RemoteReader()(one) == contents[taken]


def test_several_columns_of_images_of_which_none_is_called_so_are_listed(parts, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("fsspec")
    image = {"bytes": (parts / "000.png").read_bytes(), "path": "0.png"}
    parquet.write_table(pa.table({"mask": [image], "photo": [image]}), tmp_path / "parts.parquet")
    with pytest.raises(ValueError, match=r"`images`: .*several columns of images, \['mask', 'photo'\].* 'image'"):
        find_inputs([tmp_path / "parts.parquet"])


@pytest.mark.parametrize("content", [b"", b"PAR1, cut off"])
def test_a_parquet_file_that_is_none_is_named(tmp_path, content):
    pytest.importorskip("pyarrow")
    pytest.importorskip("fsspec")
    (tmp_path / "parts.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"`images`: .*parts.parquet is no parquet file"):
        find_inputs([tmp_path / "parts.parquet"])


def test_a_parquet_file_of_numbers_names_no_images(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("fsspec")
    parquet.write_table(pa.table({"image": [1, 2]}), tmp_path / "parts.parquet")
    with pytest.raises(ValueError, match=r"column image of .*parts.parquet must hold paths or URLs, but holds int64"):
        find_inputs([tmp_path / "parts.parquet"])


def test_a_row_without_an_image_is_not_asked_for_again(parts, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("fsspec")
    images = [{"bytes": (parts / "000.png").read_bytes(), "path": "0.png"}, None, {"bytes": None, "path": "2.png"}]
    parquet.write_table(pa.table({"image": images}), tmp_path / "parts.parquet")
    read = RemoteReader()
    first, *others = find_inputs([tmp_path / "parts.parquet"]).first(9)
    assert read(first) == images[0]["bytes"]
    for one in others:
        with pytest.raises(UnreadableImageError, match="no bytes of an image, and a path at most: give a column"):
            read(one)
    assert read.retried == 0


def test_a_tar_holds_what_its_folder_would(parts, tmp_path, monkeypatch, caplog):
    pytest.importorskip("fsspec")
    names = ["./parts/0.png", "parts/@eaDir/0.png/SYNOPHOTO_THUMB_M.png", ".cache/0.png", "__MACOSX/parts/0.png"]
    with tarfile.open(tmp_path / "parts.tar", "w") as tar:
        for name in names:
            (entry := tar.gettarinfo(parts / "000.png")).name = name
            with open(parts / "000.png", "rb") as file:
                tar.addfile(entry, file)
        (link := tarfile.TarInfo("parts/1.png")).type, link.linkname = tarfile.LNKTYPE, "parts/0.png"
        tar.addfile(link)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "diffad"):
        found = find_inputs([tmp_path / "parts.tar"])
        assert [entry.rsplit("parts/", 1)[1] for entry in found.entries()] == ["0.png"]
    assert "parts.tar are left out" in caplog.text
    monkeypatch.setattr(remote_files, "TRIES", 1)
    assert RemoteReader()(found.first(1)[0]) == (parts / "000.png").read_bytes()


def test_what_is_no_whole_tar_is_named(parts, tmp_path):
    pytest.importorskip("fsspec")
    for name, mode in (("whole", "w"), ("packed", "w:gz")):
        with tarfile.open(tmp_path / f"{name}.tar", mode) as tar:
            tar.add(parts, "parts")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:1300])
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("packed", "cut", "empty"):
        with pytest.raises(ValueError, match=f"`images`: .*{name}.tar is no tar, is compressed, or is not whole"):
            list(find_inputs([tmp_path / f"{name}.tar"]).entries())
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last, end = tar.getmembers()[-1], tar.offset
    whole = (tmp_path / "whole.tar").read_bytes()
    assert len(list(find_inputs([tmp_path / "whole.tar"]).entries())) == 2
    for i in (*range(0, end + 1, 256), last.offset_data + last.size, end + 511):  # cut anywhere, it is no whole one
        (tmp_path / "cut.tar").write_bytes(whole[:i])
        with pytest.raises(ValueError, match=r"cut.tar is no tar, is compressed, or is not whole|no images"):
            list(find_inputs([tmp_path / "cut.tar"]).entries())
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # other programs end a tar by a single block
    assert len(list(find_inputs([tmp_path / "cut.tar"]).entries())) == 2
    with pytest.raises(FileNotFoundError):
        find_inputs([tmp_path / "missing.tar.gz"])
    for name in ("packed.tar.gz", "packed.TGZ", "packed.zip"):
        with pytest.raises(ValueError, match=f"{name} is compressed, .* Unpack it"):
            find_inputs([(tmp_path / "packed.tar").rename(tmp_path / name)])
        (tmp_path / name).rename(tmp_path / "packed.tar")


def test_a_tar_among_others_is_no_unreadable_image(parts, tmp_path):
    with pytest.raises(ValueError, match=r"`images`: .*0.tar is a tar, which goes with tars alone"):
        find_inputs([tmp_path / "0.tar", parts])


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_a_local_tar_is_no_chain_of_urls(parts, tmp_path):
    (folder := tmp_path / "a::b").mkdir()
    with tarfile.open(folder / "parts.tar", "w") as tar:
        tar.add(parts, "parts")
    with pytest.raises(ValueError, match=r"`images`: .*parts\.tar has :: in it.*Rename"):
        find_inputs([folder / "parts.tar"])


def test_a_parquet_manifest_may_lie_in_any_folder(parts, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder := tmp_path / ("a__b" if sys.platform == "win32" else "a::b")).mkdir()
    parquet.write_table(pa.table({"path": [str(parts / "000.png")]}), folder / "manifest.parquet")
    assert [one.path for one in find_inputs([folder / "manifest.parquet"]).first(9)] == [parts / "000.png"]


def test_a_folder_that_is_called_as_a_tar_is_a_folder(parts):
    for suffix in (".tar", ".csv"):
        parts = parts.rename(parts.with_suffix(suffix))
        assert len(find_inputs([parts])) == 2
