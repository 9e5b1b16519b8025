"""Model cards: every number has a source, and what was not measured is not claimed."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import generator, textures, tiny_pipeline, write_mvtec
from huggingface_hub import ModelCard
from scipy import stats
from tiny_diad import tiny_diad

from diffad.evaluation.metric_names import COUNTS, METRICS
from diffad.model_card import copy_records, render_autoencoder_card, render_model_card, shareable
from diffad.training import evaluate
from diffad.training.finish import save_record

CATEGORIES = {"tile": 8, "cable": 8}
CARDS = Path(__file__).parents[1] / "model_cards"
NUMBER = re.compile(r"\d+(?:\.\d+)*(?:e[+-]?\d+)?")


def section(card: ModelCard, name: str) -> str:
    return card.text.split(f"\n## {name}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_pipeline(categories=list(CATEGORIES))
    for number, category in enumerate(CATEGORIES):
        pipeline.calibrate(
            textures(19, 16, 1000 * number), textures(8, 16, 50), 0.1, category=category, generator=generator()
        )
    return pipeline


@pytest.fixture
def report(pipeline, tmp_path, fresh_accelerate):
    """A real one, of `diffad evaluate`, with the folder that holds it."""
    data, model = write_mvtec(tmp_path / "data", CATEGORIES), tmp_path / "model"
    pipeline.save_pretrained(model)
    evaluate.main(
        ["--model", str(model), "--data", str(data), "--output", str(model / "report.json"), "--resolution", "32"]
    )
    return json.loads((model / "report.json").read_text())


def test_no_number_of_the_results_is_missing_in_the_report(pipeline, report):
    card = render_model_card(pipeline, None, report, "org/name")
    known = set(NUMBER.findall(json.dumps(report)))
    shown = NUMBER.findall(section(card, "Results").replace("org/name", ""))
    assert len(shown) > 40
    assert set(shown) <= known
    for category in CATEGORIES:
        row = next(line for line in card.text.splitlines() if line.startswith(f"| {category} | 3 | 4 |"))
        assert str(report["results"][category]["image_auroc"]) in row
        assert str(report["results"][category]["pixel_pro"]) in row


def test_the_model_index_holds_each_metric_of_each_category(pipeline, report):
    card = render_model_card(pipeline, None, report, "org/name")
    listed = {(r.dataset_config, r.metric_name): r.metric_value for r in ModelCard(str(card)).data.eval_results}
    for category in (*CATEGORIES, "mean"):
        values = report["results"][category]
        assert listed[category, "image AUROC"] == values["image_auroc"]
        assert listed[category, "pixel F1-max"] == values["pixel_f1max"]
        assert listed[category, "PRO"] == values["pixel_pro"]
    assert listed["tile", "false alarms"] == report["results"]["tile"]["false_alarms"]
    assert {r.dataset_name for r in card.data.eval_results} == {"data"}


def test_the_command_can_be_run_on_the_repository(pipeline, report):
    card = render_model_card(pipeline, None, report, "org/name")
    assert "diffad.training.evaluate --model org/name --data data" in section(card, "Results")


def test_what_is_null_in_a_report_has_no_column_and_no_entry(pipeline):
    report = {"data": "parts", "results": {"tile": {"image_auroc": 0.75, "pixel_auroc": None}, "mean": {}}}
    card = render_model_card(pipeline, None, report)
    assert "| category | image AUROC |" in card.text
    assert "| tile | 0.75 |" in card.text
    assert "| mean |" not in card.text  # over one category
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [("image AUROC", 0.75)]


def test_without_a_report_nothing_was_measured(pipeline):
    card = render_model_card(pipeline)
    assert "Nothing was measured" in section(card, "Results")
    assert not NUMBER.findall(section(card, "Results"))
    assert "model-index" not in card.data.to_dict()
    assert "no record of the training" in section(card, "Training")


def test_the_metadata_is_what_the_hub_reads(pipeline, report):
    from transformers.pipelines import get_supported_tasks

    training = {"arguments": {"dataset_name": "org/parts"}, "steps": 5}
    data = ModelCard(str(render_model_card(pipeline, training, report, "org/name", license="mit"))).data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] in get_supported_tasks()
    assert "anomaly-detection" in data["tags"]
    assert data["datasets"] == ["org/parts"]
    assert data["license"] == "mit"
    assert data["model-index"][0]["name"] == "name"


def test_training_is_told_as_it_was_recorded(pipeline):
    training = {
        "arguments": {"train_data_dir": "/home/me/good|parts", "train_batch_size": 6, "learning_rate": 0.0003},
        "categories": ["tile", "cable"],
        "steps": 1234,
        "training_seconds": 56.7,
    }
    text = section(render_model_card(pipeline, training), "Training")
    for row in (
        "| data | good\\|parts |",
        "| categories | tile, cable |",
        "| steps | 1234 |",
        "| training seconds | 56.7 |",
        "| train batch size | 6 |",
        "| learning rate | 0.0003 |",
    ):
        assert row in text


def test_thresholds_are_the_pipelines_with_the_rate_that_their_images_vouch_for(pipeline):
    text = section(render_model_card(pipeline), "Thresholds")
    for index, category in enumerate(CATEGORIES):
        image, pixel = (
            float(t[index]) for t in (pipeline.calibration.image_threshold, pipeline.calibration.pixel_threshold)
        )
        assert f"| {category} | {image:.6g} | {pixel:.6g} | 0.1 | 19 |" in text
    few = tiny_pipeline()
    with pytest.warns(UserWarning, match="cannot vouch"):
        few.calibrate(textures(5), false_alarm_rate=0.01)
    assert re.search(r"\| all \| .* \| 0.25 \| 3 \|", section(render_model_card(few), "Thresholds"))
    assert "not calibrated" in section(render_model_card(tiny_pipeline()), "Thresholds")


def test_each_method_cites_its_own_paper(pipeline):
    texts = [section(render_model_card(one), "Citation") for one in (pipeline, tiny_diad())]
    assert ["Lu, Fanbin" in text for text in texts] == [True, False]
    assert ["He, Haoyang" in text for text in texts] == [False, True]


def test_a_card_of_diad_says_what_joins_its_reconstruction():
    plain = tiny_diad()
    assert "defard2021padim" not in str(render_model_card(plain))
    plain.register_to_config(weights={"reconstruction": 2.0, "gaussian": 1.0, "nearest": 1.0})
    card = " ".join(str(render_model_card(plain)).split())
    for said in (
        "reconstruction 0.5, gaussian 0.25, nearest 0.25",
        "He et al.",
        "features themselves",
        "roth2022towards",
    ):
        assert said in card


def test_a_card_of_diad_says_on_how_many_images_defects_were_drawn():
    told, untold = (
        " ".join(str(render_model_card(tiny_diad(), {"arguments": arguments})).split())
        for arguments in ({"defect_share": 0.5}, {"defect_share": 0.0})
    )
    assert "defects were drawn on 50% of the images that guided it" in told
    assert "drawn" not in untold


def test_the_code_on_the_card_runs(pipeline, tmp_path, monkeypatch):
    from conftest import texture, write_png

    monkeypatch.chdir(tmp_path)
    write_png(Path("part.png"), texture(0))
    pipeline.save_pretrained("name")
    card = render_model_card(pipeline, repo_id="./name")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL):
        exec(code, names)
    assert names["out"].anomaly_mask.shape == (1, 16, 16)


def test_binding_data_gives_the_weights_its_licence_and_other_data_none(pipeline):
    def licence(data: str, **options) -> str | None:
        return render_model_card(pipeline, {"arguments": {"train_data_dir": data}}, **options).data.license

    assert licence("elpv/mono") == "cc-by-nc-sa-4.0"
    assert licence("elpv/mono", license="other") == "other"
    assert licence("my_parts") is None


def test_a_card_names_the_model_of_the_hub_that_the_training_started_from(pipeline, tmp_path):
    def card(**starts: object) -> ModelCard:
        save_record(Namespace(train_data_dir="elpv/mono", output_dir=str(tmp_path), **starts), {"steps": 3})
        training, _, _ = copy_records(tmp_path, (tmp_path / "copy"))
        autoencoder = render_autoencoder_card(training, "alice/vae")
        assert autoencoder.data.license == "cc-by-nc-sa-4.0"
        assert autoencoder.data.base_model == training.get("base_model")
        assert "good images of elpv/mono: `train_diad.py --vae_path alice/vae`" in autoencoder.text
        return render_model_card(pipeline, training)

    (tmp_path / "copy").mkdir()
    published = card(pretrained_model_name_or_path="org/latent", vae_path=str(tmp_path))
    assert published.data.base_model == ["org/latent"]
    assert "| base model | org/latent |" in section(published, "Training")
    assert "They were trained from org/latent, whose licence binds them as well." in section(published, "Licence")
    assert card(pretrained_model_name_or_path=None, vae_path="org/vae").data.base_model == ["org/vae"]
    both = card(pretrained_model_name_or_path="org/latent", vae_path="org/vae")
    assert both.data.base_model == ["org/latent", "org/vae"]
    assert "trained from org/latent and org/vae, whose licence" in section(both, "Licence")
    of_folders = card(pretrained_model_name_or_path=str(tmp_path), vae_path=None)
    assert of_folders.data.base_model is None
    assert "They were trained from" not in of_folders.text


def test_records_are_shared_without_secrets_and_paths_of_this_machine(tmp_path):
    record = {
        "arguments": {
            **{"hub_token": "hf_secret", "train_data_dir": "/home/me/parts/", "config": r"C:\runs\a.yaml"},
            "part_pattern": r"/part_(\d+)/",
        },
        "command": "diffad evaluate /home/me/model --data data/parts",
        "scores": {"tile": [{"path": "/home/me/parts/test/001.png", "score": 1.5}]},
    }
    expected = {
        "arguments": {"train_data_dir": "parts", "config": "a.yaml", "part_pattern": r"/part_(\d+)/"},
        "command": "diffad evaluate model --data data/parts",
        "scores": {"tile": [{"path": "001.png", "score": 1.5}]},
    }
    assert shareable(record) == expected
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "report.json").write_text(json.dumps(record))
    training, report, pictures = copy_records(tmp_path / "from", tmp_path / "to")
    assert (training, report, pictures) == (None, expected, [])
    assert json.loads((tmp_path / "to" / "report.json").read_text()) == expected
    (tmp_path / "from" / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is no JSON"):
        copy_records(tmp_path / "from", tmp_path / "to")


@pytest.mark.parametrize("record", sorted(CARDS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_record_names_no_folder_of_a_machine(record):
    shipped = json.loads(record.read_text())
    assert shareable(shipped) == shipped


# -- the cards that come with the project ------------------------------------------------------------------------

SHIPPED = pytest.mark.parametrize("folder", sorted(p.parent for p in CARDS.glob("*-*/README.md")), ids=lambda f: f.name)


def rows(text: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell, which is left out."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in others] for name, *others in lines}


@SHIPPED
def test_a_shipped_card_has_the_figures_of_its_records(folder):
    card = ModelCard((folder / "README.md").read_text())
    report, training = (json.loads((folder / f"{name}.json").read_text()) for name in ("report", "training"))
    listed = {(r.dataset_config, r.metric_name): r.metric_value for r in card.data.eval_results}
    table = rows(section(card, "Results"))
    names = {title: name for name, title in {**COUNTS, **{n: title for n, (*_, title) in METRICS.items()}}.items()}
    for category, values in report["results"].items():
        of_card = {metric: value for (name, metric), value in listed.items() if name == category}
        assert of_card == {METRICS[name][2]: values[name] for name in METRICS if values.get(name) is not None}
        if category in table:
            expected = [values.get(names[column]) for column in table["category"]]
            assert table[category] == ["" if value is None else str(value) for value in expected]
    assert set(training["categories"]) < set(table)
    of_training = rows(section(card, "Training"))
    assert of_training["steps"] == [str(training["steps"])]
    assert of_training["training seconds"] == [str(training["training_seconds"])]


@SHIPPED
def test_a_shipped_card_states_the_rate_that_holds_with_confidence(folder):
    table = rows(section(ModelCard((folder / "README.md").read_text()), "Thresholds"))
    categories = json.loads((folder / "training.json").read_text())["categories"]
    for category in categories:
        *_, rate, count, bound = table[category]
        rank = math.ceil((int(count) + 1) * (1 - float(rate)) - 1e-9)  # of the score that is the threshold
        assert bound == f"{stats.beta(int(count) + 1 - rank, rank).ppf(0.95):.3f}"


@SHIPPED
def test_a_shipped_card_is_what_the_template_makes_and_how_to_make_the_model_again(folder):
    """The template's sections in its order, and one more; its fixed sentences as they stand there."""
    text = (folder / "README.md").read_text()
    template = (CARDS / "TEMPLATE.md").read_text()
    sections = re.findall(r"^## (.*)$", template, flags=re.MULTILINE)
    sections.insert(sections.index("Results") + 1, "Make it again")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == sections
    made_again = section(ModelCard(text), "Make it again")
    assert "```bash\naccelerate launch training/" in made_again
    assert len(made_again.splitlines()) < 40
    fixed = re.findall(r"^[^{}\n]{60,}$", template.split("## Limits")[1].split("## Citation")[0], flags=re.MULTILINE)
    assert len(fixed) > 4
    for line in fixed:
        assert line in text


def test_binding_data_binds_every_shipped_card():
    for path in CARDS.glob("*-*/README.md"):
        of_solar_cells = any(name in path.parent.name for name in ("elpv", "three-categories"))
        assert ModelCard(path.read_text()).data.license == ("cc-by-nc-sa-4.0" if of_solar_cells else None)


@pytest.mark.parametrize(
    ("command", "shared"),
    [
        ("run --data '/home/alice/my parts' --seed 3", "run --data 'my parts' --seed 3"),
        ("run --data=/home/alice/parts", "run --data=parts"),
        ("run --data='/home/alice/my parts'", "run --data='my parts'"),
        ('run --data "/home/alice/my parts"', "run --data 'my parts'"),
        ("run '--data=/home/alice/parts'", "run '--data=parts'"),
        ("alice's parts, in /home/alice/parts; it's hers", "alice's parts, in parts; it's hers"),
        ("run --data org/name --output runs/a.json", "run --data org/name --output runs/a.json"),
        ("run --data ../alice/parts", "run --data parts"),
        ("run --data ~/alice/parts --roi='~alice/my roi.png'", "run --data parts --roi='my roi.png'"),
        ("../../home/alice/secret/parts", "parts"),
        (r"..\alice\parts", "parts"),
        ("../my parts", "my parts"),
        ("file:///home/alice/parts", "parts"),
        ("a,/home/alice/b", "a,b"),
        ("/home/alice/x /home/alice/y", "x y"),
        ("/usr/bin/python run.py --seed 3 data/parts", "python run.py --seed 3 data/parts"),
        ("parts(a=/home/alice/x,b='/home/alice/my y')", "parts(a=x,b='my y')"),
        ("zip://a.png::/home/alice/a.zip and host:/home/alice/b", "zip://a.png::a.zip and host:b"),
        ("s3://KEY:SECRET@bucket/x, https://tok:en@host/x", "s3://bucket/x, https://host/x"),
        ("https://host/x?sig=abc&e=1 hf://datasets/org/name@main/x", "https://host/x hf://datasets/org/name@main/x"),
        (r"run --part_pattern '/home/(\d+)/x' --data /home/y", r"run --part_pattern '/home/(\d+)/x' --data y"),
        (r"run '--part_pattern=/home/(\d+)/x'", r"run '--part_pattern=/home/(\d+)/x'"),
        ("4 images / s ... ~5/s, a .. b", "4 images / s ... ~5/s, a .. b"),
    ],
)
def test_no_private_path_stays_in_a_command(command, shared):
    assert shareable({"command": command}) == {"command": shared}
