"""Model cards (Mitchell et al., "Model Cards for Model Reporting", FAT* 2019) from what was recorded, and nothing else.

The text is `model_cards/TEMPLATE.md`. The numbers come from the pipeline (thresholds, sizes), from `training.json` and
from `report.json`: a card has no result that its report does not hold, and shows it with the report's own digits.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from diffad.evaluation.metric_names import BASELINE_TITLES, COUNTS, MEAN, METRICS
from diffad.images import Side, as_size
from diffad.reading.inputs import REPORT_SHEETS

CARD_NAME = "README.md"
TRAINING_NAME = "training.json"
REPORT_NAME = "report.json"

# The Hub has no task for anomaly detection. Of those it has, segmentation is what comes out: a mask for every image.
PIPELINE_TAG = "image-segmentation"
TAGS = ["anomaly-detection", "anomaly-localization", "defect-detection", "industrial-inspection", "diffusion", "diffad"]

FEATURE_MAPS = {
    "gaussian": "a Gaussian at each position ([PaDiM](https://arxiv.org/abs/2011.08785), Defard et al., 2021)",
    "nearest": "the nearest of those kept ([PatchCore](https://arxiv.org/abs/2106.08265), Roth et al., 2022)",
}
PAPERS = {
    "AnomalyDenoise": "https://openaccess.thecvf.com/content/ICCV2023/html/"
    "Lu_Removing_Anomalies_as_Noises_for_Industrial_Defect_Localization_ICCV_2023_paper.html",
    "DiAD": "https://arxiv.org/abs/2312.06607",
}
# what shares AnomalyDenoise's networks, by the class's name
SHARED_NETWORKS = {"GradientDenoisingPipeline": "AnomalyDenoise", "DDPMReconstructionPipeline": "AnomalyDenoise"}

# Data whose licence binds what is made from it: identifier: (name, licence on the Hub, its name).
SHARE_ALIKE = {"elpv": ("ELPV (Deitsch et al., Solar Energy 2019)", "cc-by-nc-sa-4.0", "CC BY-NC-SA 4.0")}
SECRETS = ("hub_token",)
TRAINING_ARGUMENTS = ("train_batch_size", "gradient_accumulation_steps", "learning_rate", "mixed_precision", "seed")


def render_model_card(
    pipeline: Any,
    training: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> ModelCard:
    """The card of a pipeline.

    Args:
        pipeline: an anomaly pipeline.
        training: what `training.json` holds; None where there is no record.
        report: what `report.json` holds (of `diffad evaluate` or `diffad demo`); None where nothing was measured.
        repo_id: where the card will stand on the Hub.
        license: of the weights, as the Hub names it; None takes that of the training data where it binds the weights.
        pictures: file names, relative to the card.

    Returns:
        The card, with the metadata that the Hub reads: task, tags, licence, data sets, and each metric of each category
        in its model index.
    """
    training = None if training is None else shareable(training)
    report = None if report is None else shareable(report)
    names = [parent.__name__ for parent in type(pipeline).__mro__]
    known = {**{f"{name}Pipeline": name for name in PAPERS}, **SHARED_NETWORKS}
    method = next(known[name] for name in names if name in known)
    class_name = type(pipeline).__name__
    categories = pipeline.categories
    arguments = (training or {}).get("arguments", {})
    trained_on = arguments.get("train_data_dir") or arguments.get("dataset_name") or ""
    bound = SHARE_ALIKE.get(_data_set(trained_on))
    base_model = (training or {}).get("base_model")
    results = _results_table(report) if report else None
    title = repo_id.split("/")[-1] if repo_id else class_name

    data = ModelCardData(
        license=license or (bound[1] if bound else None),
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        tags=[*TAGS, method.lower()],
        datasets=[arguments["dataset_name"]] if arguments.get("dataset_name") else None,
        base_model=base_model,
        model_name=title if report else None,
        eval_results=_evaluation_results(report) if report else None,
    )
    return ModelCard.from_template(
        data,
        template_str=files("diffad.model_cards").joinpath("TEMPLATE.md").read_text(encoding="utf-8"),
        title=title,
        method=method,
        denoiser=pipeline.unet is not None,
        at_place=pipeline.config.get("position_trust", 1.0) == 1.0,
        contrast=pipeline.config.get("contrast", 0.0),
        choice=bool((training or {}).get("choice")),
        defect_share=f"{arguments['defect_share']:.0%}" if arguments.get("defect_share") else None,
        **_maps(pipeline),
        paper_url=PAPERS[method],
        class_name=class_name,
        repo_id=repo_id,
        categories=categories,
        pictures=list(pictures),
        input_resolution=" x ".join(
            map(str, as_size(getattr(pipeline, "input_resolution", pipeline.processing_resolution)))
        ),
        tile_size=" x ".join(map(str, pipeline.tile_size)) if pipeline.tile_size else None,
        training=_training_table(pipeline, training) if training else None,
        results=results,
        data_set=report["data"] if report else None,
        resolution=report.get("resolution") if report else None,
        pro_fpr_limit=report.get("pro_fpr_limit") if report and results and "PRO" in results["header"] else None,
        command=_command(report, repo_id) if report else None,
        setting=_setting(report) if report else None,
        license_note=_license_note(license, bound, base_model),
        **_thresholds(getattr(pipeline, "calibration", None), categories),
    )


def render_autoencoder_card(training: dict[str, Any], repo_id: str) -> ModelCard:
    """The card of an autoencoder: what it is for, its data, licence and start, of what `training.json` holds."""
    arguments = training.get("arguments", {})
    trained_on = arguments.get("train_data_dir") or arguments.get("dataset_name") or "no data that a record names"
    bound, base_model = SHARE_ALIKE.get(_data_set(trained_on)), training.get("base_model")
    data = ModelCardData(
        license=bound[1] if bound else None,
        library_name="diffusers",
        tags=["autoencoder", *TAGS],
        datasets=[arguments["dataset_name"]] if arguments.get("dataset_name") else None,
        base_model=base_model,
    )
    return ModelCard(
        f"---\n{data}\n---\n\n# {repo_id.split('/')[-1]}\n\nAn `AutoencoderKL` for [DiAD]({PAPERS['DiAD']}), trained "
        f"on good images of {trained_on}: `train_diad.py --vae_path {repo_id}`. Its arguments, and its error on "
        f"held-out images, are in `training.json`.\n\n## Licence\n\n{_license_note(None, bound, base_model)}\n"
    )


def _maps(pipeline: Any) -> dict[str, Any]:
    """What a method joins: whether the denoiser has a part in it, how features are looked at, the weights."""
    weights = getattr(pipeline, "weights", None) or {}
    features = [FEATURE_MAPS[name] for name in FEATURE_MAPS if weights.get(name)]
    total = sum(weights.values())
    shares = [f"{name.replace('_', ' ')} {weight / total:.2g}" for name, weight in weights.items() if weight]
    return {
        "runs_denoiser": getattr(pipeline, "runs_denoiser", True),
        "feature_maps": f"The distance is that from {' and from '.join(features)}." if features else "",
        "weights": ", ".join(shares) if features else "",
    }


def copy_records(
    folder: str | os.PathLike, destination: str | os.PathLike, with_report: bool = True
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[str]]:
    """Copies what a repository shows beside its weights: the records, made shareable, pictures, and a card if there is
    one.

    Args:
        folder: holds any of `training.json`, `report.json`, `README.md` and `*.png`.
        destination: gets them.
        with_report: whether the report and its pictures go along.

    Returns:
        The training record, the report, and the pictures' names.

    Raises:
        ValueError: a record is no JSON.
    """
    folder, destination = Path(folder), Path(destination)
    records: list[dict[str, Any] | None] = []
    for name in (TRAINING_NAME, REPORT_NAME):
        if not (folder / name).is_file() or (name == REPORT_NAME and not with_report):
            records.append(None)
            continue
        try:
            records.append(shareable(json.loads((folder / name).read_text(encoding="utf-8"))))
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / name} is no JSON ({error}). Mend or remove it.") from error
        (destination / name).write_text(json.dumps(records[-1], indent=2) + "\n", encoding="utf-8")
    of_report = set() if with_report else {Path(REPORT_NAME).stem + ending for ending in REPORT_SHEETS}
    pictures = sorted(path.name for path in folder.glob("*.png") if path.name not in of_report)
    for name in [*pictures, CARD_NAME]:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)
    training, report = records
    return training, report, pictures


def has_report_before(folder: str | os.PathLike, seconds: float) -> bool:
    """Whether a folder holds a report that was written before a time, in seconds since the epoch."""
    report = Path(folder, REPORT_NAME)
    return report.is_file() and report.stat().st_mtime < seconds


def remove_reports(folder: str | os.PathLike) -> None:
    """Removes `report.json`, its tables, page and pictures, which speak of a model as it was before; nothing else."""
    report = Path(folder, REPORT_NAME)
    if not report.is_file():
        return
    for ending in (".csv", ".md", ".html", "-defective.png", "-good.png", ".json"):  # the record last
        report.with_name(report.stem + ending).unlink(missing_ok=True)


def shareable(record: Any) -> Any:
    """A copy of a JSON record without secrets, and with paths of this machine cut down to their last part.

    Those are absolute ones, and relative ones that lead out of the working folder. `part_pattern` is no path.
    """
    if isinstance(record, dict):
        return {
            name: value if name == "part_pattern" else shareable(value)
            for name, value in record.items()
            if name not in SECRETS
        }
    if isinstance(record, list):
        return [shareable(value) for value in record]
    if not isinstance(record, str):
        return record
    record = re.sub(r"""(://)[^\s/'"]*@""", r"\1", record)  # credentials
    record = re.sub(r"""(://[^\s?'"]*)\?[^\s'"]*=[^\s'"]*""", r"\1", record)  # a query, which may sign the URL
    return _without_paths(record)


def _without_paths(text: str) -> str:
    if _is_one_path(text):
        return _last_part(text)
    # words as a shell reads them, so that '/home/alice/my parts' is one
    word = r"""(?:[^\s'"]|'[^']*'|"[^"]*")+|['"]"""
    return re.sub(rf"--part[-_]pattern\s+(?:{word})|{word}", lambda found: _without_path(found[0]), text)


def _without_path(word: str) -> str:
    """A word of a command or a sentence; of `--data=/home/alice/parts` the flag stays."""
    if re.match(r"""['"]?--part[-_]pattern\b""", word):
        return word
    flag, equals, value = word.rpartition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        shared = _without_paths(value[1:-1])
        value = value if shared == value[1:-1] else shlex.quote(shared)
    elif _is_one_path(value):
        value = _last_part(value)
    else:
        flag, equals, value = word, "", ""
    # an apostrophe is no quotation mark; a drive's colon, and that of a URL, is in its path
    parts = re.split(r"""([\s'"`=,;|()<>\[\]{}]+|::|(?<=\w\w):(?=/(?!/)|~|\.\.))""", flag)
    return "".join(_last_part(part) if _is_private(part) else part for part in parts) + equals + value


def _is_one_path(text: str) -> bool:
    """Whether a text is a private path, with spaces and commas in it or without, and not several, or a command."""
    first, *others = re.split(r"[\s,]+", text)
    return _is_private(first) and not any(_is_private(other) or other.startswith("--") for other in others)


def _is_private(path: str) -> bool:
    """Whether a path may tell who runs this, or what lies beside the working folder."""
    if "://" in path:
        return re.match(r"(file|local):", path) is not None
    is_absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return is_absolute or bool(re.match(r"~([^\W\d][^/\\]*)?[/\\]", path)) or ".." in re.split(r"[\\/]", path)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path


def _data_set(description: str) -> str:
    """The identifier in "elpv/mono", "ELPV, mono cells: 411 good ...", "org/name" or a folder's name."""
    identifier = re.split(r"[,:]", description)[0]
    family = identifier.split("/")[0].lower()
    return family if family in SHARE_ALIKE else identifier


def _results_table(report: dict[str, Any]) -> dict[str, Any]:
    """Header and rows, one a category and then each baseline's, with the report's own digits.

    What was measured nowhere has no column.
    """
    results = dict(report["results"])
    for baseline, of_category in report.get("baselines", {}).items():
        title = BASELINE_TITLES.get(baseline, baseline)
        results |= {f"{title}, {category}": values for category, values in of_category.items()}
    if len(report["results"]) == 2:  # the mean over one category
        results = {name: values for name, values in results.items() if name.split(", ")[-1] != MEAN}
    titles = {**COUNTS, **{name: title for name, (_, _, title) in METRICS.items()}}
    columns = [name for name in titles if any(values.get(name) is not None for values in results.values())]
    return {
        "header": ["category", *(titles[name] for name in columns)],
        "rows": [
            [_cell(category), *("" if values.get(name) is None else str(values[name]) for name in columns)]
            for category, values in results.items()
        ],
        "alarms": "false_alarms" in columns or "defects_found" in columns,
    }


def _evaluation_results(report: dict[str, Any]) -> list[EvalResult]:
    """The Hub's model index: every metric of every category."""
    identifier = _data_set(report["data"])
    return [
        EvalResult(
            task_type=task,
            task_name="anomaly detection" if task == "image-classification" else "anomaly localization",
            dataset_type=identifier,
            dataset_name=identifier.upper() if identifier in SHARE_ALIKE else identifier,
            dataset_config=category,
            dataset_split="test",
            metric_type=metric,
            metric_name=title,
            metric_value=values[name],
        )
        for category, values in report["results"].items()
        for name, (task, metric, title) in METRICS.items()
        if values.get(name) is not None
    ]


def _training_table(pipeline: Any, training: dict[str, Any]) -> list[tuple[str, str]]:
    arguments = training.get("arguments", {})
    trained = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
        and name not in ("feature_extractor", "calibration", "tile_calibration", "prompt_embedding")
    }
    rows = [
        ("data", arguments.get("train_data_dir") or arguments.get("dataset_name")),
        ("categories", ", ".join(training.get("categories") or [])),
        ("base model", ", ".join(training.get("base_model") or [])),
        ("parameters", ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in trained.items())),
    ]
    if pipeline.feature_extractor is not None:
        config = pipeline.feature_extractor.config
        sizes = pipeline.feature_extractor.image_sizes
        seen = f", images of {', '.join(map(_in_words, sizes))} px" if sizes else ""
        by_index = config.out_indices is not None
        layers = f"{'layers' if by_index else 'strides'} {', '.join(map(str, config.out_indices or config.strides))}"
        rows.append(("features", f"{config.backbone}, {layers}{seen}"))
    # what the run itself recorded: steps, seconds, and whatever a script adds
    rows += [(name, value) for name, value in training.items() if isinstance(value, (int, float, str))]
    rows += [(name, arguments.get(name)) for name in TRAINING_ARGUMENTS]
    return [(name.replace("_", " "), _cell(str(value))) for name, value in rows if value not in (None, "")]


def _in_words(side: Side) -> str:
    """A side in pixels, or \"height x width\"."""
    height, width = as_size(side)
    return str(height) if height == width else f"{height} x {width}"


def _command(report: dict[str, Any], repo_id: str | None) -> str | None:
    """The report's command, with the repository in the place of the folder that was measured."""
    command = report.get("command")
    if command and repo_id and report.get("model"):
        command = command.replace(f" {shlex.quote(report['model'])} ", f" {repo_id} ")
        words = [repo_id if word == report["model"] else word for word in command.split(" ")]
        command = " ".join(words)
    return command


def _setting(report: dict[str, Any]) -> str:
    machine = report.get("machine", {})
    parts = [
        f"seed {report['seed']}" if report.get("seed") is not None else None,
        f"mixed precision {report['mixed_precision']}" if "mixed_precision" in report else None,
        machine.get("device"),
        f"torch {machine['torch']}" if "torch" in machine else None,
        f"diffad {machine['diffad']}" if "diffad" in machine else None,
    ]
    text = ", ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _thresholds(calibration: Any, categories: Sequence[str]) -> dict[str, Any]:
    if calibration is None or not calibration.has_thresholds:
        return {"calibrated": False}
    rows = []
    for index, category in enumerate(categories or ["all"]):
        if calibration.num_good_images(index):
            rows.append(
                [
                    _cell(category),
                    f"{float(calibration.image_threshold[index]):.6g}",
                    f"{float(calibration.pixel_threshold[index]):.6g}",
                    f"{calibration.stated_false_alarm_rate(index):.6g}",
                    str(calibration.num_good_images(index)),
                    f"{calibration.false_alarm_bound(index):.3f}",
                ]
            )
    return {"calibrated": True, "thresholds": rows, "leave_one_out": calibration.leave_one_out}


def _license_note(
    license: str | None, bound: tuple[str, str, str] | None, base_models: Sequence[str] | None = None
) -> str:
    if license:
        note = f"The weights are under {license}."
    elif bound:
        note = f"The training images, {bound[0]}, are under {bound[2]}, and so are these weights."
    else:
        note = "No licence is stated for these weights."
    if base_models:
        note += f" They were trained from {' and '.join(base_models)}, whose licence binds them as well."
    return f"{note} diffad itself is under Apache-2.0."


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
