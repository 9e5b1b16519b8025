"""The containers' files: their commands are commands of this version, and their parts find each other."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from diffad.cli import app

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docs" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
SERVICES = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
START = json.loads(re.search(r"^CMD (\[.*\])$", DOCKERFILE, flags=re.MULTILINE)[1])
PROMTOOL = shutil.which("promtool")


@pytest.mark.parametrize("words", [START, SERVICES["watch"]["command"]], ids=" ".join)
def test_the_containers_commands_are_commands(words):
    assert words[0] == "diffad"
    command = typer.main.get_command(app).commands[words[1]]
    context = command.make_context(words[1], list(words[2:]))  # raises where an option is none
    assert context.params["model"] == "/model"


def test_what_is_installed_are_extras():
    [extras] = re.findall(r'pip install --no-cache-dir "/source\[([\w,]+)\]"', DOCKERFILE)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(extras.split(",")) <= set(setup["options.extras_require"])
    assert set(extras.split(",")) == {"app", "watch"}


def test_what_is_installed_is_copied():
    copied = set(re.findall(r"^COPY (\w+) /source/\1$", DOCKERFILE, flags=re.MULTILINE))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {line.split(" = ")[1] for line in setup["options"]["package_dir"].strip().splitlines()}
    assert copied == folders
    [files] = re.findall(r"^COPY (.*) /source/$", DOCKERFILE, flags=re.MULTILINE)
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} == set(files.split())


def test_each_part_finds_the_others():
    command = SERVICES["watch"]["command"]
    broker, topic = re.fullmatch(r"mqtt://(\w+)/(.+)", command[command.index("--mqtt") + 1]).groups()
    assert broker in SERVICES
    assert topic
    [job] = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    default = next(p.default for p in typer.main.get_command(app).commands["serve"].params if p.name == "port")
    assert (name, int(port)) == ("serve", default)
    assert f"EXPOSE {port}" in DOCKERFILE
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source, place, *_ = volume.split(":")
            assert place.startswith("/")
            if source.startswith("./"):
                assert (DOCKER / source).is_file()
                assert place in service["command"]
    watched = {volume.split(":")[1] for volume in SERVICES["watch"]["volumes"]}
    assert {"/model", "/incoming", "/results"} == watched
    assert all(one in command for one in watched)


def test_metrics_are_what_prometheus_reads():
    pytest.importorskip("gradio")
    from prometheus_client.parser import text_string_to_metric_families
    from test_service import png, post, running

    httpx = pytest.importorskip("httpx")
    from conftest import texture, textures, tiny_pipeline

    with running(tiny_pipeline().calibrate(textures(19), false_alarm_rate=0.25)) as url:
        assert post(url, png(texture(0))).status_code == 200
        shown = httpx.get(f"{url}/metrics").text
    values = {one.name: one.value for family in text_string_to_metric_families(shown) for one in family.samples}
    assert values["diffad_images_total"] == 1.0
    assert values["diffad_request_seconds_count"] == 1.0
    assert values["diffad_drift_evidence"] > 0.0


@pytest.mark.skipif(PROMTOOL is None, reason="prometheus is not installed")
def test_prometheus_takes_its_configuration():
    subprocess.run([PROMTOOL, "check", "config", str(DOCKER / "prometheus.yml")], check=True)
