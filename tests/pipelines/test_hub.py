"""Pushing to and pulling from the Hub, as a user does: over HTTP, in fresh processes, with the real client.

Each step is a function that runs in a process of its own, as the client reads its settings when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hub_server import running_hub

ALICE, BOB = "hf_alice", "hf_bob"
CATEGORIES = ["zebra", "apple"]  # not in alphabetical order


# -- steps -------------------------------------------------------------------------------------------------------


def outcome(action: Callable[[], Any]) -> str:
    """What came of an action: its result, or the error a user would see."""
    try:
        return str(action())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def measure(pipeline: Any, path: Path, **options: Any) -> None:
    """Saves maps, scores and p-values of four images."""
    import torch
    from conftest import textures

    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    output = pipeline(textures(4, 16, first_seed=90), generator=generators, **options)
    np.savez(path, map=output.anomaly_map, score=output.anomaly_score, p_value=output.p_value)


def publish(folder: Path) -> dict[str, str]:
    """Alice publishes, Bob proposes; with the records that training and an evaluation leave beside a model."""
    import torch
    from conftest import generator, texture, textures, tiny_pipeline, write_png
    from diffusers import AutoencoderKL
    from huggingface_hub import create_repo, create_tag, upload_file, upload_folder
    from tiny_diad import tiny_diad
    from version_0_1 import as_version_0_1

    from diffad import AnomalyDenoisePipeline
    from diffad.pipelines.sharing import push_autoencoder

    model, results = folder / "model", {}
    pipeline = tiny_pipeline(categories=CATEGORIES)
    for number, category in enumerate(CATEGORIES):
        pipeline.calibrate(textures(12, 16, 40 * number), None, 0.25, category, generator=generator())
    pipeline.save_pretrained(model)
    write_png(model / "cells.png", texture(0))
    arguments = {"train_data_dir": "/home/alice/parts", "hub_token": ALICE, "output_dir": str(model), "seed": 7}
    (model / "training.json").write_text(json.dumps({"arguments": arguments, "steps": 20, "training_seconds": 1.5}))
    report = {"data": "/home/alice/parts", "results": {"zebra": {"image_auroc": 0.875}}, "scores": {"zebra": []}}
    (model / "report.json").write_text(json.dumps(report))

    pipeline = AnomalyDenoisePipeline.from_pretrained(model)
    measure(pipeline, folder / "v1.npz", category=CATEGORIES * 2)
    results["interrupted"] = outcome(lambda: pipeline.push_to_hub("alice/parts", token=ALICE))
    results["pushed"] = outcome(lambda: pipeline.push_to_hub("alice/parts", "First weights", token=ALICE))
    results["unchanged"] = outcome(lambda: pipeline.push_to_hub("alice/parts", token=ALICE))
    create_tag("alice/parts", tag="v1", token=ALICE)

    pipeline.register_to_config(alpha=0.25)
    measure(pipeline, folder / "main.npz", category=CATEGORIES * 2)
    pipeline.save_pretrained(folder / "changed", push_to_hub=True, repo_id="alice/parts", token=ALICE)
    pipeline.save_pretrained(folder / "old")
    create_repo("alice/old", token=ALICE)
    upload_folder(repo_id="alice/old", folder_path=as_version_0_1(folder / "old"), token=ALICE)

    half = AnomalyDenoisePipeline.from_pretrained(folder / "changed", dtype=torch.float16)
    measure(half, folder / "fp16.npz", category=CATEGORIES * 2)
    weights = folder / "changed" / "calibration" / "diffusion_pytorch_model.safetensors"
    stale = "calibration/diffusion_pytorch_model.fp16.safetensors"  # each variant had its own once
    upload_file(path_or_fileobj=weights, path_in_repo=stale, repo_id="alice/parts", token=ALICE)
    half.push_to_hub("alice/parts", token=ALICE, variant="fp16")

    pipeline.push_to_hub("alice/secret", token=ALICE, private=True)
    results["stranger writes"] = outcome(lambda: pipeline.push_to_hub("alice/parts", token=BOB))
    pipeline.register_to_config(alpha=0.75)
    commit = pipeline.push_to_hub("alice/parts", token=BOB, create_pr=True)
    results["proposed"] = str(commit.pr_url)

    results["not uploaded"] = outcome(lambda: finish_training(folder))
    AnomalyDenoisePipeline.from_pretrained(folder / "trained").push_to_hub("alice/trained", token=ALICE)
    results["autoencoder not uploaded"] = outcome(lambda: train_an_autoencoder(folder))
    vae = AutoencoderKL.from_pretrained(folder / "trained_vae")
    push_autoencoder(vae, folder / "trained_vae", "alice/vae", ALICE)
    diad = tiny_diad()
    measure(diad, folder / "diad.npz")
    diad.push_to_hub("alice/diad", token=ALICE)
    return results


def finish_training(folder: Path) -> None:
    """The end of a training run with --push_to_hub, into a folder of an earlier one."""
    from argparse import Namespace

    from accelerate import Accelerator
    from conftest import tiny_pipeline, write_mvtec

    from diffad.data import load_anomaly_dataset
    from diffad.training.finish import finish

    model, data = folder / "trained", write_mvtec(folder / "data", {"tile": 8})
    model.mkdir()
    (model / "report.json").write_text('{"data": "parts", "results": {"tile": {"image_auroc": 0.5}}}')
    arguments = Namespace(
        roi=None,
        part_pattern=None,
        train_data_dir=str(data),
        output_dir=str(model),
        seed=0,
        false_alarm_rate=0.25,
        push_to_hub=True,
        hub_model_id="alice/trained",
        hub_token=ALICE,
        num_example_images=2,
    )
    good = load_anomaly_dataset(data, split="train")
    training, held_out = good.select(range(5)), good.select(range(5, 8))
    finish(tiny_pipeline(), training, held_out, ["tile"], arguments, {"steps": 345}, Accelerator())


def train_an_autoencoder(folder: Path) -> None:
    """A training of one that starts from a folder, with --push_to_hub."""
    from conftest import write_folder
    from diad_runs import tiny_vae, train_vae

    tiny_vae().save_pretrained(folder / "vae")
    good = write_folder(folder / "parts", 8)
    more = ("--pretrained_model_name_or_path", folder / "vae", "--hub_token", ALICE, "--hub_model_id", "alice/vae")
    train_vae(good, folder / "trained_vae", *more, "--push_to_hub")


def pull(folder: Path) -> dict[str, str]:
    """A user with an empty cache, who imports diffusers and then diffad."""
    import torch
    from diffusers import DiffusionPipeline

    results = {"without diffad": outcome(lambda: DiffusionPipeline.from_pretrained("alice/parts"))}
    from diffad import AnomalyDenoisePipeline, DiADPipeline

    load = AnomalyDenoisePipeline.from_pretrained
    measure(load("alice/parts"), folder / "pulled-main.npz", category=CATEGORIES * 2)
    measure(load("alice/parts", revision="v1"), folder / "pulled-v1.npz", category=CATEGORIES * 2)
    any_pipeline = DiffusionPipeline.from_pretrained("alice/parts", revision="v1")
    results["class"] = type(any_pipeline).__name__
    results["categories"] = " ".join(any_pipeline.categories)
    measure(any_pipeline, folder / "pulled-any.npz", category=CATEGORIES * 2)
    half = load("alice/parts", variant="fp16", dtype=torch.float16)
    measure(half, folder / "pulled-fp16.npz", category=CATEGORIES * 2)
    results["no revision"] = outcome(lambda: load("alice/parts", revision="v9"))
    results["anonymous"] = outcome(lambda: load("alice/secret"))
    results["wrong token"] = outcome(lambda: load("alice/secret", token="hf_wrong"))
    results["other user"] = outcome(lambda: load("alice/secret", token=BOB))
    results["owner"] = type(load("alice/secret", token=ALICE)).__name__
    measure(DiADPipeline.from_pretrained("alice/diad"), folder / "pulled-diad.npz")
    measure(load("alice/old"), folder / "pulled-old.npz", category=CATEGORIES * 2)
    return results


def pull_through_diffusers(folder: Path) -> dict[str, str]:
    """A user with an empty cache, who imports diffad and then knows only diffusers."""
    import diffad  # noqa: F401

    results = {"loaded by the import": " ".join({"torch", "diffusers"} & set(sys.modules))}
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("alice/parts", revision="v1")
    measure(pipeline, folder / "pulled-through-diffusers.npz", category=CATEGORIES * 2)
    results["half"] = type(DiffusionPipeline.from_pretrained("alice/parts", variant="fp16")).__name__
    results["diad"] = type(DiffusionPipeline.from_pretrained("alice/diad")).__name__
    return results


def pull_offline(folder: Path) -> dict[str, str]:
    """The user of `pull`, later and without a network."""
    from diffusers import DiffusionPipeline

    from diffad import AnomalyDenoisePipeline

    load, results = AnomalyDenoisePipeline.from_pretrained, {}
    measure(load("alice/parts"), folder / "pulled-offline.npz", category=CATEGORIES * 2)
    results["any"] = type(DiffusionPipeline.from_pretrained("alice/diad")).__name__
    results["never pulled"] = outcome(lambda: load("alice/other"))
    return results


STEPS = {step.__name__: step for step in (publish, pull, pull_through_diffusers, pull_offline)}


# -- tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """The folder in which all steps have run, once for all workers: STEP.json, hub.json and the maps."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "hub"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_story(folder)
    assert (folder / "hub.json").exists(), "the steps failed in another test"
    return folder


def run_story(folder: Path) -> None:
    with running_hub({ALICE: "alice", BOB: "bob"}) as hub:
        hub.failures |= {"alice/parts": 1, "alice/trained": 1, "alice/vae": 1}

        def start(step: str, home: str, **environment: str) -> subprocess.Popen:
            inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DIFFUSERS"))}
            settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / home), "HF_HUB_DISABLE_XET": "1"}
            tests = Path(__file__).parents[1]  # of the modules that tests share
            settings["PYTHONPATH"] = os.pathsep.join(map(str, (tests, tests / "training")))
            with open(folder / f"{step}.log", "w") as log:
                return subprocess.Popen(
                    [sys.executable, __file__, step, str(folder)],
                    env={**inherited, **settings, **environment},
                    stdout=log,
                    stderr=log,
                )

        def finish(step: str, process: subprocess.Popen) -> None:
            code = process.wait(timeout=600)
            assert code == 0, f"{step}: {(folder / f'{step}.log').read_text()[-4000:]}"

        finish("publish", start("publish", "alice"))
        sent = list(hub.requests)
        steps = {"pull": "user", "pull_through_diffusers": "stranger"}
        for step, process in [(step, start(step, home)) for step, home in steps.items()]:
            finish(step, process)
        received = list(hub.requests)
        finish("pull_offline", start("pull_offline", "user", HF_HUB_OFFLINE="1"))
        contents = {
            name: {
                ref: {path: file.content.decode(errors="replace") for path, file in repository.commits[sha].items()}
                for ref, sha in repository.refs.items()
            }
            for name, repository in hub.repositories.items()
        }
        private = [name for name, repository in hub.repositories.items() if repository.private]
        summary = {"sent": sent, "offline": hub.requests[len(received) :], "private": private, "contents": contents}
        (folder / "hub.json").write_text(json.dumps(summary))


def results(story: Path, name: str) -> dict[str, Any]:
    return json.loads((story / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("pulled", "pushed"),
    [
        ("pulled-main", "main"),
        ("pulled-v1", "v1"),
        ("pulled-any", "v1"),
        ("pulled-through-diffusers", "v1"),
        ("pulled-offline", "main"),
        ("pulled-fp16", "fp16"),
        ("pulled-diad", "diad"),
        ("pulled-old", "main"),
    ],
)
def test_what_is_pulled_gives_the_bits_of_what_was_pushed(story, pulled, pushed):
    after, before = np.load(story / f"{pulled}.npz"), np.load(story / f"{pushed}.npz")
    assert set(before) == {"map", "score", "p_value"}
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
        assert np.isfinite(before[name]).all()


def test_revisions_and_variants_are_not_all_the_same(story):
    maps = [np.load(story / f"{name}.npz")["map"] for name in ("main", "v1", "fp16")]
    assert not np.array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[0], maps[2])


def test_a_repository_is_complete_and_safe(story):
    contents = results(story, "hub")["contents"]
    parts = contents["alice/parts"]
    folders = ("unet", "feature_extractor", "calibration")
    assert set(parts["v1"]) == {
        *(f"{name}/diffusion_pytorch_model.safetensors" for name in folders),
        *(f"{name}/config.json" for name in folders),
        "scheduler/scheduler_config.json",
        *("model_index.json", "README.md", "training.json", "report.json", "cells.png"),
    }
    added = set(parts["main"]) - set(parts["v1"])
    # all variants share the calibration
    assert added == {f"{name}/diffusion_pytorch_model.fp16.safetensors" for name in ("unet", "feature_extractor")}
    assert json.loads(parts["v1"]["report.json"])["data"] == "parts"
    assert {"good-1.png", "good-2.png", "README.md"} <= set(contents["alice/trained"]["main"])  # from training itself
    del contents["alice/old"]  # a folder's upload, without the pipeline's own care
    for repository in contents.values():
        for content in repository["main"].values():
            for private in (str(story), "/home/alice", ALICE):
                assert private not in content


def test_the_card_speaks_of_the_report_and_stays_when_other_weights_come(story):
    parts = results(story, "hub")["contents"]["alice/parts"]
    assert "| zebra | 0.875 |" in parts["v1"]["README.md"]
    assert 'from_pretrained("alice/parts")' in parts["v1"]["README.md"]
    # the changed weights came from a folder without a report
    assert parts["main"]["README.md"] == parts["v1"]["README.md"]


def test_a_training_run_pushes_its_record_but_no_earlier_report(story):
    trained = results(story, "hub")["contents"]["alice/trained"]["main"]
    assert "| steps | 345 |" in trained["README.md"]
    assert "Nothing was measured" in trained["README.md"]
    assert "report.json" not in trained
    assert ALICE not in (story / "trained" / "training.json").read_text()


def test_an_upload_that_fails_after_a_training_says_what_to_do(story):
    words = results(story, "publish")["not uploaded"]
    assert words.startswith("RuntimeError: --push_to_hub: the upload failed (")
    assert words.endswith(f"The model is saved; `diffad push {story / 'trained'} alice/trained` uploads it.")
    words, folder = results(story, "publish")["autoencoder not uploaded"], str(story / "trained_vae")
    assert words.startswith("RuntimeError: --push_to_hub: the upload failed (")
    assert f"push_autoencoder(AutoencoderKL.from_pretrained({folder!r}), {folder!r}, 'alice/vae')` uploads" in words


def test_a_pushed_autoencoder_has_a_card_and_its_record(story):
    vae = results(story, "hub")["contents"]["alice/vae"]["main"]
    assert set(vae) == {"config.json", "diffusion_pytorch_model.safetensors", "training.json", "README.md"}
    assert "`train_diad.py --vae_path alice/vae`" in vae["README.md"]
    assert "More Information Needed" not in vae["README.md"]
    assert "held_out_l1" in json.loads(vae["training.json"])


def test_an_interrupted_push_goes_on_and_an_unchanged_one_sends_nothing(story):
    published, sent = results(story, "publish"), results(story, "hub")["sent"]
    assert "503" in published["interrupted"]
    assert "/alice/parts/commit/" in published["pushed"]
    assert published["unchanged"] == published["pushed"]
    first_tag = sent.index("POST /api/models/alice/parts/tag/main")
    uploads = [request for request in sent[:first_tag] if request.startswith("PUT /lfs/alice/parts/")]
    assert len(uploads) == len(set(uploads)) == 3  # each of the three weights once, in three pushes
    commits = [request for request in sent[:first_tag] if request == "POST /api/models/alice/parts/commit/main"]
    assert len(commits) == 2


def test_who_may_not_write_proposes(story):
    published, hub = results(story, "publish"), results(story, "hub")
    assert "403" in published["stranger writes"]
    assert published["proposed"].endswith("/alice/parts/discussions/1")
    parts = hub["contents"]["alice/parts"]
    proposed, main = (json.loads(parts[ref]["model_index.json"])["alpha"] for ref in ("refs/pr/1", "main"))
    assert (proposed, main) == (0.75, 0.25)


def test_a_private_repository_is_its_owners(story):
    pulled = results(story, "pull")
    assert results(story, "hub")["private"] == ["alice/secret"]
    assert pulled["owner"] == "AnomalyDenoisePipeline"
    for name in ("anonymous", "other user"):
        assert pulled[name].startswith("RepositoryNotFoundError")
        assert "alice/secret" in pulled[name]
        assert "token" in pulled[name]
    assert "401" in pulled["wrong token"]
    assert "alice/secret" in pulled["wrong token"]
    assert "v9" in pulled["no revision"]


def test_diffusers_own_class_loads_it_after_the_import(story):
    pulled = results(story, "pull")
    assert pulled["class"] == "AnomalyDenoisePipeline"
    assert pulled["categories"] == "zebra apple"


def test_diffusers_own_class_needs_nothing_but_the_import(story):
    pulled = results(story, "pull_through_diffusers")
    assert pulled["loaded by the import"] == ""
    assert (pulled["half"], pulled["diad"]) == ("AnomalyDenoisePipeline", "DiADPipeline")
    # without it, the error names what is missing
    assert results(story, "pull")["without diffad"].startswith("ValueError")
    assert "diffad" in results(story, "pull")["without diffad"]


def test_offline_nothing_is_asked_of_the_network(story):
    pulled = results(story, "pull_offline")
    assert results(story, "hub")["offline"] == []
    assert pulled["any"] == "DiADPipeline"
    assert "alice/other" in pulled["never pulled"]


def test_pickles_are_refused(tmp_path):
    from conftest import tiny_pipeline

    with pytest.raises(ValueError, match="`safe_serialization=False` would write pickles"):
        tiny_pipeline().save_pretrained(tmp_path, safe_serialization=False)


if __name__ == "__main__":
    name, directory = sys.argv[1:]
    summary = STEPS[name](Path(directory))
    Path(directory, f"{name}.json").write_text(json.dumps(summary, indent=2))
