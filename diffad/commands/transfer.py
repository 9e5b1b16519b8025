"""Commands that bring a model elsewhere, `diffad export`, `convert` and `push`; `diffad.cli` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from diffad.commands.models import load_pipeline
from diffad.commands.options import BadImages, Model, OnBadImage
from diffad.model_folder import check_folder, check_local

if TYPE_CHECKING:
    from datasets import Dataset

console = Console(stderr=True)  # standard output is for results


def export(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The file, .onnx or .xml.")],
    format: Annotated[str | None, typer.Option(metavar="NAME", help="onnx or openvino (by OUTPUT's ending).")] = None,
    precision: Annotated[str, typer.Option(metavar="NAME", help="fp32, fp16 (weights) or int8.")] = "fp32",
    data: Annotated[str | None, typer.Option(metavar="DATA", help="For int8: good images, not trained on.")] = None,
    uint8: Annotated[bool, typer.Option("--uint8", help="The graph takes pixels from 0 to 255.")] = False,
    on_bad_image: BadImages = OnBadImage.error,
) -> None:
    """A model with its calibration as one file for ONNX Runtime, OpenVINO and others.

    predict, watch, serve, evaluate and benchmark take it as MODEL. int8 calibrates anew by good images, of which every
    fifth sets thresholds.
    """
    from diffad.deployment import Runtime
    from diffad.deployment.export import export_pipeline

    check_local(output)
    images = None
    if data is not None:
        from diffad.data import load_anomaly_dataset
        from diffad.data.checks import good_of_one_category, without_copies

        why = "int8 takes a model of one. Give its own images."
        dataset = load_anomaly_dataset(data, "train", on_bad_image=on_bad_image.value)
        good = good_of_one_category(dataset, f"`data`: {data}", why)
        images = without_copies(good)["image"]
    input_type = "uint8" if uint8 else "float32"
    pipeline = load_pipeline(model, "cpu")
    path = export_pipeline(pipeline, output, format, precision, images, input_type)
    if precision == "int8" and (found := Runtime(path).metadata.quantization) is not None:
        console.print(
            f"Of {found['images']} good images that set thresholds {found['alarms_before']:.1%} raised an alarm in "
            f"float32, and {found['alarms']:.1%} do in 8 bits. "
            f"Maps differ by {found['median_map_error']:.0%} (median of the norms).",
            highlight=False,
            soft_wrap=True,
        )
        if (test := defects_among_test_images(str(data))) is not None:
            from diffad.evaluation.detectors import image_auroc

            before, after = image_auroc(pipeline, test), image_auroc(Runtime(path), test)
            console.print(
                f"Image AUROC of the {len(test)} test images: {before:.1%} in float32, {after:.1%} in 8 bits.",
                highlight=False,
                soft_wrap=True,
            )
    console.print(f"Saved to {escape(str(path))}. Next: diffad predict {escape(str(path))} NEW_PARTS --output RESULTS")


def defects_among_test_images(data: str) -> Dataset | None:
    """A data set's test images where good and defective ones are among them, which a ranking takes; else None."""
    from diffad.data import load_anomaly_dataset
    from diffad.data.loading import is_plain_folder

    if is_plain_folder(data):
        return None
    try:
        test = load_anomaly_dataset(data, "test", on_bad_image="skip")
    except (FileNotFoundError, ValueError):  # no test images, or not all of their masks: nothing that an export needs
        return None
    return test if {*test["label"]} == {0, 1} else None


def convert(
    method: Annotated[str, typer.Argument(metavar="diad|taef2", help="What it is a checkpoint of.")],
    state_dict_or_path: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help=".ckpt, .pth or .safetensors; for taef2 the folder of both")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for what comes of it.")],
    prompt_embeds: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Empty prompt's embedding, .safetensors.")
    ] = None,
) -> None:
    """A published checkpoint to a saved pipeline, or autoencoder."""
    if method not in ("diad", "taef2"):
        raise ValueError(f"Only 'diad' and 'taef2' checkpoints can be converted, not {method!r}.")

    check_folder(output)

    from diffad.conversion import load_diad_checkpoint, load_taef2

    if method == "taef2":
        load_taef2(state_dict_or_path).save_pretrained(output)
        console.print(f"Saved to {escape(str(output))}. Next: training/train_diad.py --vae_path {escape(str(output))}")
        return
    pipeline = load_diad_checkpoint(state_dict_or_path, prompt_embeds=prompt_embeds)
    pipeline.save_pretrained(output)
    if pipeline.feature_extractor is None:
        console.print(
            "The checkpoint brings no network that images are compared with. Save the pipeline once more with one:\n"
            f'DiADPipeline.from_pretrained("{escape(str(output))}", feature_extractor='
            'TimmFeatureExtractor.from_backbone("resnet50", (4, 8, 16)))',
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"Saved to {escape(str(output))}. Next: diffad calibrate {escape(str(output))} --data GOOD_IMAGES")


def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="org/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    token: Annotated[str | None, typer.Option(metavar="TOKEN", help="Of the Hub (the one you logged in with).")] = None,
) -> None:
    """Uploads a saved pipeline with its model card."""
    from huggingface_hub.errors import HfHubHTTPError

    pipeline = load_pipeline(model, "cpu")
    try:
        commit = pipeline.push_to_hub(repo_id, private=private or None, token=token)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"The Hub does not let you write to {repo_id} ({error.response.status_code}). Log in with `hf auth login`, "
            "or give a `token` that may write there."
        ) from error
    console.print(f"Pushed to {commit.commit_url}", highlight=False, soft_wrap=True)
