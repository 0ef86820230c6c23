"""The page of a run's experts: every layer, the right numbers, nothing from outside."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from scripts import moe_report
from tests.small_run import run

EVERYWHERE = {
    "moe__vision__experts": "4",
    "moe__vision__top_k": "1",
    "moe__vision__expert_width": "16",
    "moe__vision__layers": "[1]",
    "moe__projector__experts": "4",
    "moe__projector__top_k": "2",
    "moe__projector__expert_width": "16",
    "moe__text__capacity_factor": "1.0",
    "moe__text__aux_loss": "0.01",
    "training__steps": "3",
    "checkpoint__export_hf": "false",
}


class Page(HTMLParser):
    """Tags that are open at the end, texts by tag, pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.images, self.points = [], {}, [], []
        self.feed(text)
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            encoded = dict(attrs)["src"].removeprefix("data:image/png;base64,")
            self.images.append(Image.open(io.BytesIO(base64.b64decode(encoded))))
        elif tag == "polyline":
            self.points.append(dict(attrs)["points"].split())
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(text)


def reports(path):
    return [json.loads(line) for line in (path / "moe.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "real"
    assert run(path, **EVERYWHERE) == 0
    return path


def test_a_page_of_a_real_run_has_every_layer_and_its_numbers(real, capsys):
    assert moe_report.main([str(real)]) == 0
    assert capsys.readouterr().out.strip() == str(real / "moe.html")
    text = (real / "moe.html").read_text()
    page, lines = Page(text), reports(real)
    assert not page.open
    names = list(lines[0]["layers"])
    assert {name.split(".")[0] for name in names} == {"text", "vision"} and len(names) >= 4
    assert page.texts["h4"] == names
    assert page.data["real"]["steps"] == [1, 2, 3]
    for name in names:
        figures = page.data["real"]["layers"][name]
        assert set(figures) == set(lines[0]["layers"][name]) >= {"load", "imbalance", "dead"}
        for key, values in figures.items():
            assert values == [line["layers"][name][key] for line in lines]
    # A row of the table for each layer, and the last figures in it.
    cells = page.texts["td"]
    for name in names:
        assert f"{lines[-1]['layers'][name]['imbalance']:.4g}" == cells[cells.index(name) + 1]
    assert {"Drop rate", "Switch loss", "Experts without a token"} <= set(page.texts["h3"])


def test_the_heat_map_has_a_pixel_for_each_expert_and_step(real):
    moe_report.main([str(real)])
    page = Page((real / "moe.html").read_text())
    loads = [figures["load"] for figures in page.data["real"]["layers"].values()]
    assert len(page.images) == len(loads)
    for image, load_SE in zip(page.images, loads, strict=True):
        assert image.size == (len(load_SE), len(load_SE[0]))  # width, height
        for s, load_E in enumerate(load_SE):
            for e, load in enumerate(load_E):
                pixel, even = image.getpixel((s, e)), sum(load_E) / len(load_E)
                if load == 0:
                    assert pixel == (68, 1, 84)
                elif load == even:
                    assert pixel == (33, 145, 140)
                else:
                    assert pixel != (68, 1, 84)
                    assert load < 2 * even or pixel == (253, 231, 37)


def test_nothing_is_loaded_from_outside(real):
    moe_report.main([str(real)])
    text = (real / "moe.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<link|@import|src=\"(?!data:)|url\(", text)


def write(path, imbalances, name="text.layers.0", torn=""):
    path.mkdir(parents=True)
    lines = [
        json.dumps({"step": step, "layers": {name: {"load": [1, 3], "imbalance": x}}})
        for step, x in imbalances.items()
    ]
    (path / "moe.jsonl").write_text("\n".join(lines) + "\n" + torn)
    return path


def test_runs_are_compared_in_one_plot(tmp_path):
    one = write(tmp_path / "one", {1: 1.0, 2: 3.0})
    other = write(tmp_path / "other", {1: 2.0, 2: 1.0, 3: 1.0})
    output = tmp_path / "page.html"
    assert moe_report.main([str(one), str(other), "-o", str(output)]) == 0
    page = Page(output.read_text())
    assert list(page.data) == ["one", "other"]
    first, second = page.points[:2]  # the first plot
    heights = [[float(point.split(",")[1]) for point in curve] for curve in (first, second)]
    top, bottom = heights[0][1], heights[0][0]  # of imbalance 3 and 1
    assert top < bottom
    assert heights[1] == [pytest.approx((top + bottom) / 2), bottom, bottom]
    across = [[float(point.split(",")[0]) for point in curve] for curve in (first, second)]
    assert across[0] == across[1][:2]  # the same steps at the same places


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [write(tmp_path / name / "run", {1: 1.0}) for name in ("a", "b")]
    output = tmp_path / "page.html"
    assert moe_report.main([*map(str, paths), "-o", str(output)]) == 0
    assert list(Page(output.read_text()).data) == [str(path) for path in paths]


def test_a_long_run_is_drawn_with_neighbours_together(tmp_path):
    path = write(tmp_path / "long", {step: float(step) for step in range(1, 1001)})
    moe_report.main([str(path)])
    found = Page((path / "moe.html").read_text()).data["long"]
    assert found["steps"] == [*range(3, 1000, 3), 1000]
    figures = found["layers"]["text.layers.0"]
    assert figures["imbalance"][:2] == [2.0, 5.0] and figures["imbalance"][-1] == 1000.0
    assert figures["load"][0] == [3, 9] and figures["load"][-1] == [1, 3]


def test_a_name_cannot_break_the_page(tmp_path):
    path = write(tmp_path / "run", {1: 1.0}, name="</script><b>x")
    moe_report.main([str(path)])
    page = Page((path / "moe.html").read_text())
    assert "b" not in page.texts and page.texts["h4"] == ["</script><b>x"]
    assert list(page.data["run"]["layers"]) == ["</script><b>x"]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = write(tmp_path / "run", {1: 1.0, 2: 2.0}, torn='{"step": 3, "la')
    assert moe_report.main([str(path)]) == 0
    assert Page((path / "moe.html").read_text()).data["run"]["steps"] == [1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        ("", "it is empty"),
        ('{"step": 1, "lay', "it is empty"),
        ('{"step": 1}\n{"step": 2, "layers": {}}\n', "line 1 is no report"),
    ],
)
def test_a_file_that_is_none_is_one_line_and_status_2(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "moe.jsonl").write_text(content)
    assert moe_report.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'moe.jsonl'}: ") and said in line
