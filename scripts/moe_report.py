"""How a run's experts were loaded, balanced and timed: one HTML page from its moe.jsonl.

    scripts/moe_report.py runs/a                    writes runs/a/moe.html
    scripts/moe_report.py runs/a runs/b -o x.html   and how the balance of several runs compares

The page needs nothing else, neither a network nor a server; its numbers are in it as JSON, too, in
the element "data": {run: {"steps": [...], "layers": {layer: {figure: [a number per step]}}}}. Of
long runs, neighbouring reports are drawn together: loads are added, other figures averaged.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from titan_vlm.errors import DataError
from titan_vlm.training.heatmap import heat_map
from titan_vlm.training.moe_log import relative_load

MOST_STEPS = 400  # more cannot be told apart on a page
WIDTH, HEIGHT = 860, 260  # of a plot
HEAT_MAP_HEIGHT = 8  # of an expert, in pixels
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f"]
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 960px; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
img { image-rendering: pixelated; width: 860px; display: block; border: 1px solid #ccc }
svg text { font-size: 11px; fill: #444 }
.key { display: inline-block; margin-right: 1.2em }
.key i { display: inline-block; width: 14px; height: 3px; margin: 0 5px 4px 0 }
"""

# Of a run: {"steps": [...], "layers": {layer: {figure: [...]}}}; None where a layer lacks it.
Run = dict


def read_run(path: Path) -> Run:
    """The figures of a run directory.

    Raises:
        DataError: it has no moe.jsonl, or one without a report.
    """
    file = path / "moe.jsonl"
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; a run with experts writes one")
    records, lines = [], file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append((record["step"], record["layers"]))
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # else torn: the run is writing it, or died doing so
                raise DataError(f"{file}: line {number} is no report of experts") from None
    if not records:
        raise DataError(f"{file}: it is empty; the run has not reported a step yet")
    return condense([step for step, _ in records], [layers for _, layers in records])


def condense(steps: list[int], reports: list[dict]) -> Run:
    """At most MOST_STEPS columns; each is named by the last step in it."""
    share = -(-len(steps) // MOST_STEPS)
    groups = [reports[i : i + share] for i in range(0, len(steps), share)]
    layers: dict[str, dict[str, list]] = {}
    for name in dict.fromkeys(name for report in reports for name in report):
        keys = dict.fromkeys(key for report in reports for key in report.get(name, {}))
        layers[name] = {
            key: [_joined([r.get(name, {}).get(key) for r in group]) for group in groups]
            for key in keys
        }
    last = [steps[min(i + share, len(steps)) - 1] for i in range(0, len(steps), share)]
    return {"steps": last, "layers": layers}


def _joined(values: list):
    """Of neighbouring reports; None where none of them has the figure."""
    values = [x for x in values if x is not None]
    if len(values) < 2:
        return values[0] if values else None
    if isinstance(values[0], list):
        return [sum(column) for column in zip(*values, strict=True)]
    return sum(values) / len(values)


# ---------------------------------------------------------------------------- the page


def page(runs: dict[str, Run]) -> str:
    """The whole page, of runs by name."""
    parts = [f"<h1>Experts of {html.escape(', '.join(runs))}</h1>"]
    if len(runs) > 1:
        parts += compared(runs)
    for name, run in runs.items():
        parts += of_run(name, run)
    data = json.dumps(runs).replace("<", "\\u003c")  # the element must not end inside it
    parts.append(f'<script type="application/json" id="data">{data}</script>')
    head = f'<meta charset="utf-8"><title>Experts</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n"


def compared(runs: dict[str, Run]) -> list[str]:
    """Plots of the runs beside each other."""
    parts = ["<h2>The runs compared</h2>"]
    for title, choose in (("mean over the layers", _mean), ("worst layer", max)):
        curves = {
            name: list(zip(run["steps"], _over_layers(run, "imbalance", choose), strict=True))
            for name, run in runs.items()
        }
        parts += [f"<h3>Imbalance (max / mean load), {title}</h3>", plot(curves, least=1.0)]
    return parts


def of_run(name: str, run: Run) -> list[str]:
    """Everything about one run."""
    steps, layers = run["steps"], run["layers"]

    def curves(key: str) -> dict[str, list]:
        return {
            layer: list(zip(steps, figures[key], strict=True))
            for layer, figures in layers.items()
            if key in figures
        }

    parts = [f"<h2>{html.escape(name)}</h2>", "<h3>Imbalance (max / mean load)</h3>"]
    parts.append(plot(curves("imbalance"), least=1.0))
    for key, title in PLOTS.items():
        if found := curves(key):
            parts += [f"<h3>{title}</h3>", plot(found)]
    parts += [f"<h3>At step {steps[-1]}</h3>", table(layers)]
    parts.append(
        f"<h3>Load</h3><p>Experts from the top, step {steps[0]} to {steps[-1]} from the left; dark "
        "blue: no token, green: an even share, yellow: twice that and more.</p>"
    )
    for layer, figures in layers.items():
        parts.append(f"<h4>{html.escape(layer)}</h4>{load_picture(figures['load'])}")
    return parts


PLOTS = {
    "drop_rate": "Drop rate",
    "dead": "Experts without a token",
    "gate_entropy": "Entropy of the gate (nats)",
    "balance_loss": "Balance loss, weighted",
    "aux_loss": "Switch loss",
    "sequence_loss": "Sequence loss",
    "importance_loss": "Importance loss",
    "z_loss": "Z-loss",
    "cv_importance": "Variation of importance",
    "cv_load": "Variation of load",
    "moe_ms": "Milliseconds of a step in the layer",
    "a2a_ms": "Milliseconds of a step in its exchanges",
}


def _over_layers(run: Run, key: str, choose) -> list[float | None]:
    columns = zip(*(x[key] for x in run["layers"].values() if key in x), strict=True)
    present = [[x for x in column if x is not None] for column in columns]
    return [choose(column) if column else None for column in present]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(layers: dict[str, dict]) -> str:
    """The last figures, a row for each layer."""
    keys = dict.fromkeys(key for figures in layers.values() for key in figures if key != "load")
    rows = ["".join(f"<th>{html.escape(x)}</th>" for x in ("layer", *keys))]
    for name, figures in layers.items():
        last = [figures[key][-1] if key in figures else None for key in keys]
        cells = ["" if x is None else f"{x:.4g}" for x in last]
        rows.append("".join(f"<td>{html.escape(x)}</td>" for x in (name, *cells)))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def load_picture(loads: list[list[int] | None]) -> str:
    """Experts x steps, as an image in the page."""
    size = next(len(x) for x in loads if x)
    load_SE = torch.tensor([x or [0] * size for x in loads])
    cells = heat_map(relative_load(load_SE).T)[:, ::8, ::8]  # a pixel each; the page enlarges them
    file = io.BytesIO()
    Image.fromarray(cells.permute(1, 2, 0).contiguous().numpy()).save(file, "png")
    encoded = base64.b64encode(file.getvalue()).decode()
    height = size * HEAT_MAP_HEIGHT
    return f'<img alt="load" style="height:{height}px" src="data:image/png;base64,{encoded}">'


def plot(curves: dict[str, list[tuple[int, float | None]]], least: float = 0.0) -> str:
    """Curves of (step, value) in one plot from `least` up, with their names below."""
    points = [(x, y) for curve in curves.values() for x, y in curve if y is not None]
    if not points:
        return "<p>no figures</p>"
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low = min(least, *(y for _, y in points))
    high = max(y for _, y in points)
    high = high if high > low else low + 1.0
    left, bottom = 60, HEIGHT - 20

    def place(x: float, y: float) -> str:
        across = left + (x - first) / max(last - first, 1) * (WIDTH - left - 10)
        return f"{across:.1f},{bottom - (y - low) / (high - low) * (bottom - 10):.1f}"

    lines, keys = [], []
    for i in range(5):
        y = low + (high - low) * i / 4
        at = place(first, y).split(",")[1]
        lines.append(f'<path d="M{left} {at}H{WIDTH - 10}" stroke="#e4e4e4"/>')
        lines.append(f'<text x="{left - 6}" y="{at}" text-anchor="end">{y:.3g}</text>')
    lines.append(f'<text x="{left}" y="{HEIGHT - 4}">step {first}</text>')
    lines.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 4}" text-anchor="end">step {last}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        name, known = html.escape(name), [place(x, y) for x, y in curve if y is not None]
        style = f'fill="none" stroke="{colour}" stroke-width="1.5"'
        points = " ".join(known)
        lines.append(f'<polyline {style} points="{points}"><title>{name}</title></polyline>')
        if len(known) == 1:  # a line of one point is nothing to see
            x, y = known[0].split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        keys.append(f'<span class="key"><i style="background:{colour}"></i>{name}</span>')
    svg = f'<svg width="{WIDTH}" height="{HEIGHT}">{"".join(lines)}</svg>'
    return f"{svg}<div>{''.join(keys)}</div>"


def names_of(paths: list[Path]) -> list[str]:
    """The shortest that tell them apart: the last folder, else the whole path."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.output_dir of a run")
    parser.add_argument("-o", "--output", type=Path, help="default: moe.html in the first RUN")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.runs[0] / "moe.html"
    try:
        paths = list(dict.fromkeys(arguments.runs))
        runs = dict(zip(names_of(paths), map(read_run, paths), strict=True))
        output.write_text(page(runs))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {output}: {error.strerror}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
