"""README and docs: examples run, on a tiny model under the names that they use; figures are those of the records."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import BACKBONE, textures, tiny_extractor, tiny_pipeline, write_folder, write_mvtec, write_png
from diffusers import AutoencoderKL
from hub_server import running_hub
from launching import read_until_serving
from scipy import stats
from test_pipeline_diad import make_pipeline
from tiny_taef2 import save_as_published, tiny_taef2
from typer.testing import CliRunner

from diffad import AnomalyDenoisePipeline
from diffad.calibration.good_images import GoodImages
from diffad.cli import app
from diffad.pipelines.updating import learn_good_images, save_updatable
from diffad.predict import find_images, predict_files
from diffad.training.train_autoencoder import AUTOENCODER_PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]


def blocks(language: str) -> list[str]:
    """The code blocks of README and docs, each once."""
    texts = [page.read_text() for page in PAGES]
    found = [re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL) for text in texts]
    return list(dict.fromkeys(code for of_page in found for code in of_page))


def commands() -> list[list[str]]:
    """Each command line of the shell blocks, as words, once."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    split = [tuple(shlex.split(part, comments=True)) for line in lines for part in line.split("&&") if part.strip()]
    return [list(words) for words in dict.fromkeys(split) if words]


@pytest.fixture
def workplace(tmp_path, monkeypatch, stable_diffusion) -> Path:
    """A folder with what the reader has by then: models, parts, a data set, the training scripts."""
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_pipeline()
    pipeline.calibrate(textures(12), false_alarm_rate=0.25)
    pipeline.fit_gaussian(textures(12), image_size=16, feature_size=4)
    for name in ("runs/demo", "runs/parts", "runs/denoiser"):
        pipeline.save_pretrained(name)
    growing = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=16))
    learn_good_images(growing, textures(12), good_images := GoodImages(200), 0.25)
    save_updatable(growing, good_images, "runs/growing")
    make_pipeline().calibrate(textures(12), false_alarm_rate=0.25).save_pretrained("runs/diad")
    AutoencoderKL(**AUTOENCODER_PRESETS["cpu-128"]).save_pretrained("runs/autoencoder")
    AutoencoderKL.from_pretrained(stable_diffusion / "vae").save_pretrained("runs/autoencoder-sd")
    save_as_published(tiny_taef2(levels=4), tmp_path / "taesd")
    tiny_taef2(levels=4).save_pretrained("runs/taef2")
    (tmp_path / "training").symlink_to(ROOT / "training")
    (tmp_path / "stable-diffusion-v1-5").mkdir()
    (tmp_path / "stable-diffusion-v1-5" / "stable-diffusion-v1-5").symlink_to(stable_diffusion)
    write_png(tmp_path / "part.png", textures(1)[0])
    write_folder(tmp_path / "good_parts", 12)
    write_folder(tmp_path / "new_good_parts", 12, first_seed=12)
    write_folder(tmp_path / "new_parts", 3)
    (tmp_path / "parts.csv").write_text("image,part\nnew_parts/000.png,a\nnew_parts/001.png,b\nnew_parts/002.png,c\n")
    (tmp_path / "manifest.csv").write_text("path\nnew_parts/000.png\nnew_parts/001.png\n")
    predict_files(pipeline, sorted((tmp_path / "new_parts").iterdir()), tmp_path / "runs" / "line")
    write_mvtec(tmp_path / "data")
    predict_files(pipeline, find_images(["new_parts"]), "runs/found")
    return tmp_path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[], Path]:
    """Makes an exported model, once, where what it takes is installed."""

    @functools.cache
    def make() -> Path:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        pipeline = AnomalyDenoisePipeline(None, None, tiny_extractor(image_size=16))
        pipeline.calibrate(textures(12), false_alarm_rate=0.25)
        return pipeline.export(tmp_path_factory.mktemp("exported") / "parts.onnx")

    return make


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code, workplace, exported):
    if '"parts.onnx"' in code:
        (workplace / "parts.onnx").symlink_to(exported())
    exec(compile(code, "example", "exec"), {})


LASTING = ("watch", "serve")  # until Ctrl-C


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "diffad" and c[1] in LASTING], ids=" ".join)
def test_examples_that_run_until_ctrl_c_end_by_it(words, workplace):
    pytest.importorskip({"watch": "watchfiles", "serve": "gradio"}[words[1]])
    shutil.rmtree("runs/line")
    command = [sys.executable, "-m", "diffad.cli", *words[1:], *(["--port", "0"] if words[1] == "serve" else [])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            read_until_serving(process)
            table = Path("runs/line/scores.csv")
            while words[1] == "watch" and not (table.is_file() and table.read_text().count("\n") == 4):
                assert process.poll() is None
                time.sleep(0.1)  # until each of the three new parts has its row
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert "Stopped" in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(
    "words", [c for c in commands() if c[0] == "diffad" and c[1] not in ("demo", "push", *LASTING)], ids=" ".join
)
def test_diffad_examples_run(words, workplace, exported, fresh_accelerate):
    if words[1] == "export":
        pytest.importorskip("onnxscript")
    elif "parts.onnx" in words:
        (workplace / "parts.onnx").symlink_to(exported())
    short = ["--minutes", "0.001"] if words[1] == "train" else []  # the last one counts
    result = CliRunner().invoke(app, [*words[1:], *short], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("words", [c for c in commands() if c[:2] == ["diffad", "push"]], ids=" ".join)
def test_push_examples_run(words, workplace):
    with running_hub({"hf_org": "org"}) as hub:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(workplace / "home"), "HF_TOKEN": "hf_org"}
        command = [sys.executable, "-m", "diffad.cli", *words[1:]]
        subprocess.run(command, env={**inherited, **settings, "HF_HUB_DISABLE_XET": "1"}, check=True)
        assert "org/parts" in hub.repositories


# what makes an example short: one step of two images, an untrained miniature backbone
SHORT = ["--max_train_steps", "1", "--train_batch_size", "2", "--mixed_precision", "no"]
MINIATURE = ["--backbone", BACKBONE, "--backbone_weights", "random", "--feature_strides", "2", "4"]


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "accelerate"], ids=" ".join)
def test_accelerate_examples_run(words, workplace, fresh_accelerate):
    """The arguments as they stand, cut short."""
    if words[2] == "--config_file":  # accelerate's own
        assert (ROOT / words[3]).is_file()
        words = words[:2] + words[4:]
    script, arguments = words[2], words[3:]
    if words[2:4] == ["-m", "diffad.predict"]:
        result = CliRunner().invoke(app, ["predict", *words[4:]], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return
    assert (ROOT / script).is_file()
    main = importlib.import_module(f"diffad.{script.removesuffix('.py').replace('/', '.')}").main
    if script == "training/train_ddpm.py":
        arguments += [*SHORT, "--feature_image_size", "64"]
    elif "--config" in arguments:
        arguments += [*SHORT, *MINIATURE, "--train_data_dir", "good_parts"]
        if "training/configs/diad_256_cpu.yaml" in arguments:
            arguments += ["--resolution", "128", "--score_strides", "2", "4"]
    elif "--pretrained_model_name_or_path" in arguments:
        arguments += [*SHORT, *MINIATURE, "--resolution", "32", "--gradient_accumulation_steps", "1"]
    elif script == "training/fit_gaussian.py":
        arguments += ["--image_size", "16", "--feature_size", "4"]
    main(arguments)


def test_the_two_set_up_commands_stand_in_the_readme():
    lines = "".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)).splitlines()
    assert 'pip install -e ".[demo]" && diffad demo' in lines
    assert 'pip install -e ".[demo,test]" && pytest' in lines


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "model_cards").glob("*/README.md"))], ids=str)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_project_that_a_page_names_is_there(page):
    folders = r"(?:diffad|pipelines|training|tests|model_cards|docs|\.ci|\.github)"
    named = set(re.findall(rf"`({folders}/[\w./-]*)`", page.read_text()))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


# -- figures -----------------------------------------------------------------------------------------------------

IMAGE = ["image_auroc", "image_ap", "image_f1max"]
PIXEL = ["pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_pro"]
PARTS = {"mono": "elpv-mono", "poly": "elpv-poly", "magnetic_tile": "magnetic-tile"}
# each row of the table of solar cells and tiles: where its parts' metrics stand
RECORDS = {
    "`diffad fit`": ("fit.json", "results"),
    "`diffad fit --multi-scale`": ("fit-multi-scale.json", "results"),
    "AnomalyDenoise": ("anomaly-denoise-{}/report.json", "results"),
    "AnomalyDenoise, one model for all three": ("anomaly-denoise-three-categories/report.json", "results"),
    "DiAD": ("diad-{}/report.json", "results"),
    "DiAD, one model for both kinds of cells": ("diad-elpv-mono-poly/report.json", "results"),
    "PaDiM, ours, all 176 channels": ("anomaly-denoise-{}/report.json", "baselines", "padim"),
    "PaDiM, anomalib's, 100 channels": ("anomaly-denoise-{}/anomalib.json", "results", "padim"),
    "PatchCore, anomalib's, 1%": ("anomaly-denoise-{}/anomalib.json", "results", "patchcore"),
}


def recorded(title: str, part: str, metrics: list[str], report: str = "report") -> str:
    """A cell of a table as the shipped record has it; empty where the model does not know the part."""
    path, *keys = RECORDS[title]
    results = json.loads((ROOT / "model_cards" / path.format(PARTS[part]).replace("report.", f"{report}.")).read_text())
    for key in keys:
        results = results[key]
    part = "magnetic tiles" if "magnetic tiles" in results and part == "magnetic_tile" else part
    return " / ".join(f"{100 * results[part][name]:.1f}" for name in metrics) if part in results else ""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(text: str, heading: str) -> list[list[list[str]]]:
    """The tables of a section, each a list of rows, the header first."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    return [[cells(line) for line in table.splitlines() if "---" not in line] for table in found]


def test_the_tables_say_what_the_records_say():
    of_images, of_pixels = tables(RESULTS, "Solar cells and magnetic tiles")
    assert of_images[0] == ["method", "mono cells", "poly cells", "magnetic tiles"]
    assert of_images[1:] == [[title, *(recorded(title, part, IMAGE) for part in PARTS)] for title in RECORDS]

    methods = [
        "`diffad fit`",
        "`--multi-scale`",
        "AnomalyDenoise",
        "one model for all three",
        "DiAD",
        "PaDiM, ours",
        "PaDiM, anomalib's",
        "PatchCore, anomalib's",
    ]
    values = [recorded(title, "magnetic_tile", PIXEL) for title in RECORDS]
    assert of_pixels == [methods, [value for value in values if value]]


def test_the_readmes_table_says_what_the_records_say():
    [[head, *rows], _] = tables(README, "What it reaches")
    assert head[2:] == ["`diffad fit`", "`fit --multi-scale`", "AnomalyDenoise", "DiAD", "PaDiM", "PatchCore"]
    columns = ["`diffad fit`", "`diffad fit --multi-scale`", "AnomalyDenoise", "DiAD"]
    columns += ["PaDiM, ours, all 176 channels", "PatchCore, anomalib's, 1%"]
    names = {"mono solar cells": "mono", "poly solar cells": "poly", "magnetic tiles": "magnetic_tile"}
    kinds = {"image AUROC / AP / F1-max": IMAGE, "pixel AUROC / AP / F1-max / PRO": PIXEL}
    of_images, of_pixels = kinds
    chosen = [(name, of_images) for name in names] + [("magnetic tiles", of_pixels)]
    assert rows == [
        [name, kind, *(recorded(title, names[name], kinds[kind]) for title in columns)] for name, kind in chosen
    ]


def test_the_readme_has_the_figures_of_the_other_parts_from_the_results():
    [_, [head, *shown]] = tables(README, "What it reaches")
    assert head == ["part", "measured", "`diffad fit`", "`fit --multi-scale`", "DiAD", "PatchCore"]
    overview, bottle, _ = tables(RESULTS, "Parts for which no setting was chosen")
    expected: dict[tuple[str, str], list[str]] = {}
    part = ""
    for name, method, *values in overview[1:]:  # a part's rows after the first leave out its name
        part = re.split(r"[ ,]", name)[0] or part
        expected[part, method] = values
    of_bottle = {row[0]: row[1:3] for row in bottle[1:]}
    assert of_bottle["AnomalyDenoise, README's training command"] == expected["bottle", "AnomalyDenoise"]
    assert of_bottle["PaDiM, ours, strides 2 to 16"] == expected["bottle", "PaDiM, ours"]
    for name, *values in tables(RESULTS, "DiAD at 256 px")[0][1:]:
        expected[re.split(r"[ ,]", name)[0], "DiAD"] = values
    expected["bottle", "PatchCore, anomalib's, 1%"] = of_bottle["PatchCore, anomalib's, 1%"]
    assert [row[0].split(" ")[0] for row in shown] == [p for p in ("bottle", "transistor", "capsule") for _ in range(2)]
    for row, column in zip(shown, [0, 1] * 3, strict=True):  # image AUROC, then pixel metrics
        part = row[0].split(" ")[0]
        methods = ("`diffad fit`", "`diffad fit --multi-scale`", "DiAD", "PatchCore, anomalib's, 1%")
        assert row[2:] == [expected.get((part, method), ["", ""])[column] for method in methods]
    assert [row[1] for row in shown] == ["image AUROC", "pixel AUROC / AP / F1-max / PRO"] * 3
    assert any("12 of its 23 good test images" in row[0] for row in shown)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("fit.json", "`diffad fit`"),
        ("fit-multi-scale.json", "`diffad fit --multi-scale`"),
        ("train.json", "`diffad train`"),
    ],
)
def test_what_fit_and_train_reach_is_what_their_records_say(name, method):
    record = json.loads((ROOT / "model_cards" / name).read_text())["results"]
    overview, *_ = tables(RESULTS, "Parts for which no setting was chosen")
    rows = {re.split(r"[ ,]", part)[0]: values for part, of, *values in overview[1:] if of == method}
    assert set(rows) == {"bottle", "transistor", "capsule"} | ({"KolektorSDD"} if name == "fit.json" else set())
    for part, values in rows.items():
        metrics = record[part]
        assert values == [" / ".join(f"{100 * metrics[name]:.1f}" for name in names) for names in (IMAGE[:1], PIXEL)]


def test_what_diad_reaches_at_256_px_is_what_its_record_says():
    record = json.loads((ROOT / "model_cards" / "diad-256.json").read_text())

    def shown(metrics: dict, names: Sequence[str]) -> str:
        return " / ".join(f"{100 * metrics[name]:.1f}" for name in names if name in metrics)

    reached, steps, rebuilt, started, of_zeros = tables(RESULTS, "DiAD at 256 px")
    parts = [re.split(r"[ ,]", row[0])[0] for row in reached[1:-1]]
    seeds = [*record["random_start"]["by_seed"].values()]

    def mean(part: str, what: str, row: str | None = None) -> dict[str, float]:
        of_seeds = [seed[part][what] if row is None else seed[part][what][row] for seed in seeds]
        return {name: statistics.fmean(one[name] for one in of_seeds) for name in of_seeds[0]}

    joined, alone = ({part: mean(part, "feature_weights", row) for part in parts} for row in ("3/4", "0"))
    zeros = {part: {name: mean for name, (mean, _) in record["results"][part].items()} for part in parts}
    zero_start = (zeros, record["feature_weights"]["0"], record["unified"]["3/4"])
    for table, columns in ((reached, (joined, alone)), (of_zeros, zero_start)):
        for part, row in zip(parts, table[1:-1], strict=True):
            for i, of in enumerate(columns):
                assert row[2 * i + 1 : 2 * i + 3] == [shown(of[part], names) for names in (IMAGE[:1], PIXEL)]
        means = [f"{100 * statistics.fmean(of[part]['image_auroc'] for part in parts):.1f}" for of in columns]
        assert [value for value in table[-1][1:] if value] == means
    for name, *values in steps[1:]:
        rows = [record["reverse_process"][part][name] for part in parts]
        assert values == [shown(row, ["image_auroc", "pixel_ap"]).replace(" / ", ", ") for row in rows]
    for what, *values in rebuilt[1:-3]:
        name = {"DiAD": "reconstruction", "its autoencoder alone": "autoencoder"}.get(what)
        name = name or f"reconstruction {what.removeprefix('DiAD, ').replace('pieces', 'piece').removesuffix('s')}"
        name = name.replace("scratche", "scratch")
        assert values == [f"{record['rebuilding'][part][name]:.1f}" for part in parts]
    for row, name in ((-3, "reconstruction"), (-2, "perfect repair")):
        of_five = record["rebuilding_of_the_model_for_five"]
        assert rebuilt[row][1:] == [f"{of_five[part][name]:.1f}" for part in parts]
    without = record["without_drawn_defects"]["rebuilding"]
    assert rebuilt[-1][1:4] == [f"{without[part]['reconstruction']:.1f}" for part in parts[:3]]
    at_random = [mean(part, "rebuilding") for part in parts]
    least = [min(seed[part]["rebuilding"]["reconstruction"] for seed in seeds) for part in parts]
    whats = ("reconstruction", "reconstruction, kinds alike", "reconstruction uneven light")
    of_whats = [[f"{one[what]:.1f}" for one in at_random] for what in whats]
    assert started[1][1:] == [f"{record['rebuilding'][part]['reconstruction']:.1f}" for part in parts]
    assert [row[1:] for row in started[2:-1]] == [of_whats[0], [f"{one:.1f}" for one in least], *of_whats[1:]]
    of_five = record["random_start"]["rebuilding_of_the_model_for_five"]
    assert started[-1][1:] == [f"{of_five[part]['reconstruction']:.1f}" for part in parts]
    _, bottle, _ = tables(RESULTS, "Parts for which no setting was chosen")
    [values] = [row[1:3] for row in bottle if row[0].startswith("DiAD at 256 px")]
    assert values == [shown(joined["bottle"], names) for names in (IMAGE[:1], PIXEL)]


def test_what_anomalib_reaches_on_other_parts_is_what_its_record_says():
    record = json.loads((ROOT / "model_cards" / "anomalib-parts.json").read_text())["results"]
    overview, *_ = tables(RESULTS, "Parts for which no setting was chosen")
    part, compared = "", 0
    for name, method, *values in overview[1:]:
        part = re.split(r"[ ,]", name)[0] or part
        metrics = record["padim" if "PaDiM" in method else "patchcore"].get(part)
        if "anomalib's" in method and metrics:
            assert values == [" / ".join(f"{100 * metrics[n]:.1f}" for n in names) for names in (IMAGE[:1], PIXEL)]
            compared += 1
    assert compared == 4


def test_the_demos_table_says_what_the_records_say():
    [rows] = tables(RESULTS, "The demo")
    for seed, report in enumerate(("report", "report-seed-1", "report-seed-2")):
        alarms = recorded("AnomalyDenoise", "mono", ["defects_found", "false_alarms"], report).split(" / ")
        metrics = recorded("AnomalyDenoise", "mono", IMAGE, report).split(" / ")
        assert rows[1 + seed] == [str(seed), *metrics, *(f"{share}%" for share in alarms)]


def test_the_table_of_seeds_says_what_the_records_say():
    [[_, *rows]] = tables(RESULTS, "Other seeds")
    metrics = {"": IMAGE, "pixel AUROC": ["pixel_auroc"], "PRO": ["pixel_pro"]}
    for title, what, *values in rows:
        part, _, metric = what.partition(", ")
        part = "magnetic_tile" if part == "tiles" else part
        reports = ("report", "report-seed-1", "report-seed-2")
        assert values == [recorded(title, part, metrics[metric], report) for report in reports], (title, what)
    assert len(rows) == 7


def test_the_table_of_float32_says_what_the_records_say():
    [[_, *rows]] = tables(RESULTS, "In float32")
    title = ""
    for first, what, image, pixel, *_ in rows:  # a model's rows after the first leave out its title
        title, part = first or title, "magnetic_tile" if what == "tiles" else what
        assert image == recorded(title, part, IMAGE, "report-float32"), (title, part)
        of_pixels = recorded(title, part, ["pixel_auroc", "pixel_pro"], "report-float32") if what == "tiles" else ""
        assert pixel == of_pixels, (title, part)
    assert len(rows) == 10


def test_the_rates_that_hold_with_confidence_are_beta_quantiles():
    text = (ROOT / "docs" / "method.md").read_text()
    (_, *rows), (_, *left_out) = tables(text, "3. What the thresholds promise")
    assert len(rows) == 6
    for images, stated, *shown in rows:
        count, rate = int(images), float(stated.rstrip("%")) / 100
        rank = math.ceil((count + 1) * (1 - rate) - 1e-9)  # of the score that is the threshold
        true_rate = stats.beta(count + 1 - rank, rank)
        mean, low, high, bound = (f"{100 * x:.1f}%" for x in (true_rate.mean(), *true_rate.ppf([0.025, 0.975, 0.95])))
        assert shown == [mean, f"{low} and {high}", bound]
    promises = {
        README: "with 62 at 5%, the rate of your one model lies between 1.0% and 11.2% in 95 of 100 cases",
        text: "With 62 images at a stated 5%, 95% of models lie between 1.0% and 11.2%",
    }
    for page, promise in promises.items():  # in words
        words = " ".join(page.split())
        assert "holds on average over calibration sets" in words
        assert promise in words
        assert "9.8%" in words
    record = json.loads((ROOT / "model_cards" / "leave-one-out.json").read_text())["results"]
    assert [row[0] for row in left_out] == list(record)
    for part, *shown in left_out:
        ways = [record[part][name]["alarms"].values() for name in ("left out in turn", "a fifth held out")]
        assert shown == [f"{100 * share:.1f}" for shares in ways for share in shares]


def test_what_is_said_of_large_images_is_what_the_record_says():
    record = json.loads((ROOT / "model_cards" / "large-images.json").read_text())
    shown = [table[1:] for table in tables(RESULTS, "Large images")]
    for title, image, pixel, *differences in shown[0]:
        row = record["kolektor_sdd"]["methods"][title]
        assert [image, pixel] == [" / ".join(f"{100 * row[n]:.1f}" for n in names) for names in (IMAGE[:1], PIXEL)]
        for metric, difference in zip(("image_auroc", "pixel_ap"), differences, strict=True):
            if f"{metric}_difference" in row:
                ends = (row[f"{metric}_difference"], *row[f"{metric}_difference_interval"])
                assert difference == "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in ends))
            else:
                assert not difference
    assert [row[0] for row in shown[0]] == list(record["kolektor_sdd"]["methods"])
    for what, *values in shown[1]:
        row = record["mosaics"][what]
        shares = [
            row[name] for name in ("found_at_the_rate", "found_at_the_threshold", "false_alarms_at_the_threshold")
        ]
        at_rate, at_threshold, alarms = (f"{100 * share:.0f}%" for share in shares)
        assert values == [at_rate, f"{100 * row['auroc']:.1f}", at_threshold, alarms, f"{row['seconds_to_fit']:.0f}"]
