"""The page of an evaluation: what it says, that it escapes, and that a browser shows it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from browser import browser, find_browser
from conftest import texture
from PIL import Image

from diffad.evaluation.cases import Case, case_caption, choose_cases
from diffad.evaluation.metrics import AnomalyMetrics
from diffad.evaluation.page import render_report_page

EVIL = '<script>alert("x")</script>&'


def evaluated(
    good: int = 12, bad: int = 20, masks: bool = True, threshold: float | None = 3.0
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """A category's result, records and curves, as `evaluate` makes them."""
    rng = np.random.default_rng(0)
    metrics = AnomalyMetrics()
    records = []
    for i in range(good + bad):
        label = int(i >= good)
        score = rng.gamma(2.0) + 3.0 * label
        mask = np.zeros((1, 16, 16), bool)
        mask[:, 3:7, 3:9] = label
        anomaly_map = rng.normal(size=(1, 16, 16)) + 2.0 * mask
        metrics.update(anomaly_score=[score], label=[label])
        if masks:
            metrics.update(anomaly_map=anomaly_map, mask=mask)
        records.append(
            {
                "path": f"test/{'hole' if label else 'good'}/{i:03}.png",
                "label": label,
                "defect": "hole" if label else "good",
                "score": float(score),
                "p_value": None if threshold is None else 1.0 / (1.0 + score),
                "is_anomalous": None if threshold is None else bool(score > threshold),
            }
        )
    result = {name: None if np.isnan(value) else round(value, 6) for name, value in metrics.compute().items()}
    for name, label in (("false_alarms", 0), ("defects_found", 1)) if threshold is not None else ():
        alarms = [r["is_anomalous"] for r in records if r["label"] == label]
        result[name] = float(np.mean(alarms)) if alarms else None
    result.update(good_images=good, defective_images=bad, images_per_second=12.3)
    return result, records, metrics.curves()


def picture(seed: int = 0, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    image = texture(seed, size)
    return np.hstack([image, 255 - image])


def two_categories() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments of `render_report_page`: a report with baselines, its curves, and cases."""
    report: dict[str, Any] = {
        "model": "org/parts",
        "data": "data/parts",
        "seed": 7,
        "command": "diffad evaluate org/parts --data data/parts",
        "machine": {"device": "4 CPU cores", "platform": "Linux", "torch": "2.9", "diffad": "0.1"},
        "results": {},
        "scores": {},
    }
    curves, cases = {}, {}
    for name in ("bolt", "nut"):
        result, records, curves[name] = evaluated()
        report["results"][name], report["scores"][name] = result, records
        cases[name] = [
            Case(title, case_caption(records[i]), picture(i))
            for title, indices in choose_cases(records).items()
            for i in indices
        ]
    report["results"]["mean"] = {"image_auroc": 0.9876, "pixel_pro": 0.1234}
    report["baselines"] = {
        "PaDiM": {"bolt": {"image_auroc": 0.5}, "nut": {"image_auroc": 0.6}, "mean": {"image_auroc": 0.5501}}
    }
    return report, curves, cases


class Outline(HTMLParser):
    """Tags that are not closed in order, and the table cells' texts by row."""

    VOID = {"meta", "link", "img", "br", "line", "path"}  # noqa: RUF012

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.misplaced: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.misplaced.append(tag)

    def handle_data(self, data):
        if {"th", "td"} & set(self.open[-2:]):
            self.rows[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_the_page_holds_settings_metrics_figures_and_cases():
    report, curves, cases = two_categories()
    page = render_report_page(report, curves, cases)
    outline = Outline(page)
    assert not outline.misplaced
    assert not outline.open
    for words in ("org/parts", "data/parts", "4 CPU cores, Linux, torch 2.9, diffad 0.1", report["command"]):
        assert words in page
    assert re.search(r"<dt>seed</dt><dd>7</dd>", page)

    titles = ["image AUROC", "image AP", "image F1-max", "pixel AUROC", "pixel AP", "pixel F1-max", "PRO", "AUPIMO"]
    assert outline.rows[0] == ["category", *titles]
    names = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_pro")
    names += ("pixel_aupimo",)
    bolt = report["results"]["bolt"]
    assert outline.rows[1] == ["bolt", *(f"{100 * bolt[name]:.1f}" for name in names)]
    assert outline.rows[3] == ["mean", "98.8", "–", "–", "–", "–", "–", "12.3", "–"]
    assert outline.rows[4][:2] == ["PaDiM, mean", "55.0"]  # the last row: what else there is
    assert outline.rows[5][0] == "category"  # and again by category
    assert [row[:2] for row in outline.rows[6:]] == [["bolt", "50.0"], ["nut", "60.0"]]

    assert outline.count("svg") == 2 * 4
    assert outline.count("img") == sum(map(len, cases.values()))
    assert "defective, lowest score" in page
    assert cases["bolt"][0].caption in page
    missed = [r for r in report["scores"]["bolt"] if r["label"] and not r["is_anomalous"]]
    found = 20 - len(missed)
    assert f"({found} of 20)" in page
    assert f"PRO {100 * bolt['pixel_pro']:.1f}% up to 30% false positives" in page


def test_nothing_comes_from_elsewhere():
    tags = Outline(render_report_page(*two_categories())).tags
    for tag, attributes in tags:
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "url(" not in render_report_page(*two_categories())


def test_every_string_is_escaped():
    report = two_categories()[0] | dict.fromkeys(("model", "data", "seed", "command", "mixed_precision"), EVIL)
    report["machine"] = dict.fromkeys(report["machine"], EVIL)
    result, records, category_curves = evaluated()
    records = [{**record, "path": f"{EVIL}.png", "defect": EVIL} for record in records]
    report["results"] = {EVIL: result, "bolt": result}
    report["scores"] = {EVIL: records}
    report["baselines"] = {EVIL: {EVIL: result, "mean": result}}
    page = render_report_page(
        report, {EVIL: category_curves}, {EVIL: [Case(EVIL, case_caption(records[-1]), picture())]}
    )
    outline = Outline(page)
    assert outline.count("script") == 0
    assert not outline.misplaced
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&amp;") >= 14


@pytest.mark.parametrize(
    ("settings", "drawings"),
    [
        ({"masks": False}, 2),
        ({"bad": 0}, 1),
        ({"good": 0}, 3),  # pixels of both kinds there are
        ({"threshold": None}, 4),
        ({"good": 1, "bad": 1}, 4),
        ({"threshold": 1e9}, 4),  # nothing raises an alarm
    ],
    ids=str,
)
def test_a_category_that_lacks_something_still_has_its_section(settings, drawings):
    result, records, curves = evaluated(**settings)
    page = render_report_page({"results": {"bolt": result}, "scores": {"bolt": records}}, {"bolt": curves}, {})
    outline = Outline(page)
    assert not outline.misplaced
    assert outline.count("svg") == drawings
    assert "nan" not in page.lower()
    assert ("not calibrated" in page) == (settings.get("threshold", 3.0) is None)
    if "bad" in settings and not settings["bad"]:
        assert "No metric is defined" in page


def test_a_report_of_results_alone():
    page = render_report_page({"results": {"bolt": {"image_auroc": 0.5}}}, {}, {})
    assert not Outline(page).misplaced
    assert Outline(page).rows[1] == ["bolt", "50.0"]


def test_far_outliers_and_equal_scores_are_drawn():
    _, records, _ = evaluated(bad=0)
    for scores in ([1.0] * 12, [0.0] * 11 + [float("inf")], [*range(11), 1e30]):
        of_scores = [{**record, "score": score} for record, score in zip(records, scores, strict=True)]
        page = render_report_page({"results": {"bolt": {}}, "scores": {"bolt": of_scores}}, {}, {})
        heights = re.search(r'class="good bars" d="([^"]*)Z"', page)[1]
        assert all(np.isfinite(float(number)) for number in re.findall(r"[-\d.e+]+", heights))
        assert "inf" not in heights


def test_the_threshold_is_the_results_own_where_it_is_given():
    result, records, _ = evaluated()
    report = {"results": {"bolt": result}, "scores": {"bolt": records}}
    assert "alarm above" not in render_report_page(report, {}, {})
    report["results"]["bolt"]["image_threshold"] = 3.125
    assert "alarm above <b>3.125</b>" in render_report_page(report, {}, {})


def test_cases_are_the_extremes_of_either_kind():
    records = [{"label": label, "score": score} for label, score in [(0, 1), (1, 9), (0, 4), (1, 2), (1, 7), (0, 3)]]
    assert choose_cases(records) == {
        "defective, highest score": [1, 4],
        "defective, lowest score": [3],
        "good, highest score": [2, 5],
        "good, lowest score": [0],
    }
    many = [{"label": label, "score": score} for label in (0, 1) for score in range(10)]
    assert choose_cases(many) == {
        "defective, highest score": [19, 18, 17, 16],
        "defective, lowest score": [10, 11, 12, 13],
        "good, highest score": [9, 8, 7, 6],
        "good, lowest score": [0, 1, 2, 3],
    }
    assert choose_cases(records[:1]) == {"good, highest score": [0]}
    assert choose_cases([]) == {}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"label": 1, "defect": "hole", "is_anomalous": True}, "007.png (hole): score 2.5, p = 0.031, found"),
        ({"label": 1, "defect": "defective", "is_anomalous": False}, "007.png: score 2.5, p = 0.031, missed"),
        ({"label": 0, "defect": "good", "is_anomalous": True}, "007.png: score 2.5, p = 0.031, false alarm"),
        ({"label": 0, "defect": "good", "is_anomalous": False}, "007.png: score 2.5, p = 0.031, passed"),
        ({"label": 0, "p_value": None, "is_anomalous": None}, "007.png: score 2.5"),
    ],
)
def test_a_caption_names_file_score_and_verdict(record, words):
    assert case_caption({"path": "test/hole/007.png", "score": 2.5, "p_value": 0.03125, **record}) == words


def test_pictures_are_small_and_true_to_the_original():
    large = np.repeat(np.repeat(picture(size=(40, 60)), 20, axis=0), 20, axis=1)  # 800 x 2400
    page = render_report_page({"results": {"bolt": {}}}, {}, {"bolt": [Case("a", "b", large)]})
    content = base64.b64decode(re.search(r"data:image/jpeg;base64,([^\"]+)", page)[1])
    shown = Image.open(io.BytesIO(content))
    assert shown.size == (768, 256)
    expected = Image.fromarray(large).resize(shown.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(shown, float) - np.asarray(expected, float)).mean() < 4.0
    assert len(content) < 100_000
    with pytest.raises(ValueError, match=r"`picture` must be \(H, W, 3\) uint8.*float64"):
        render_report_page({"results": {"bolt": {}}}, {}, {"bolt": [Case("a", "b", large / 255.0)]})


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_a_browser_shows_the_page_in_both_schemes_and_on_a_phone(tmp_path):
    report, curves, cases = two_categories()
    path = tmp_path / "report.html"
    path.write_text(render_report_page(report, curves, cases), encoding="utf-8")
    (tmp_path / "profile").mkdir()
    brightness = {}
    with browser(find_browser(), tmp_path / "profile") as page:
        for width, scheme in ((1280, "light"), (1280, "dark"), (375, "light")):
            page.open(path.as_uri(), width=width, scheme=scheme)
            assert page.complaints() == []
            assert [url for url in page.requests() if not url.startswith("data:")] == [path.as_uri()]
            sizes = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth, i.clientHeight])")
            assert len(sizes) == sum(map(len, cases.values()))
            for natural, shown_width, shown_height in sizes:
                assert natural == 120
                assert shown_width > 150
                assert shown_width / shown_height == pytest.approx(3.0, rel=0.02)  # neither squeezed nor stretched
            drawings = page.evaluate(
                "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(r => [r.x, r.right])"
            )
            assert len(drawings) == 8
            assert all(left >= 0 and right - left > 150 and right <= width for left, right in drawings)
            # wide tables scroll by themselves, the page never does
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            colours = page.evaluate(
                "['color', 'backgroundColor'].map(p => getComputedStyle(document.body)[p].match(/\\d+/g).map(Number))"
            )
            brightness[scheme] = [sum(colour[:3]) / 3 for colour in colours]
    assert brightness["light"][0] < 80 < 200 < brightness["light"][1]
    assert brightness["dark"][1] < 80 < 200 < brightness["dark"][0]
