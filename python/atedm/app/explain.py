"""An HTML page about one image: full against pruned, what was kept and why, times and FLOPs. It needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from PIL import Image

from atedm.app import pictures, report
from atedm.app.comparison import COLUMNS, Comparison, is_disturbed
from atedm.files import whole_file
from atedm.policy.ranking import make_ranking
from atedm.policy.recovery import RECOVERIES
from atedm.policy.schedule import PRUNING
from atedm.policy.staleness import STALENESS
from atedm.unet.recording import Recording

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1f2233; --faint: #6b7085; --line: #e3e5ee; --accent: #0f766e; }
body { margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.5rem 4rem; color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p { margin: .3rem 0; } .faint { color: var(--faint); }
.pair { display: flex; flex-wrap: wrap; gap: 1.2rem; margin-top: 1.4rem; }
figure { margin: 0; flex: 1 1 260px; max-width: 512px; }
figure img { width: 100%; border-radius: 8px; display: block; }
figcaption { margin-top: .4rem; } .gain { color: var(--accent); font-weight: 600; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; color: var(--faint); font-size: .85rem; } th:first-child, td:first-child { text-align: left; }
.wide { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$prompt</h1>
<p class="faint">$title, on $device</p>
<div class="pair">$images</div>
<h2>Time and work</h2>
$figures
<h2>Which tokens were computed</h2>
<p class="faint">$method</p>
<img class="wide" alt="kept tokens of every block and step" src="$kept">
<h2>How they were ranked</h2>
<img class="wide" alt="scores of every block and step" src="$scores">
<h2>Block by block</h2>
$blocks
<h2>Settings</h2>
<dl>$settings</dl>
</body>
</html>
""")

_STEPS = {
    "whole": "computed every token",
    "light": "dropped tokens in most blocks",
    "pruned": "dropped tokens in every pruned block",
    "reused": "reused the deep features of an earlier step",
}


def _told(kinds: Sequence[str], settings: dict[str, Any]) -> str:
    """What the calls of a run did, by kind, and how tokens were chosen, if any were dropped."""
    told = [f"{kinds.count(kind)} {what}" for kind, what in _STEPS.items() if kind in kinds]
    calls = f"Of {len(kinds)} calls of the UNet, {', '.join(told)}."
    return f"{calls} {_method(settings)}" if PRUNING & set(kinds) else calls


def _method(settings: dict[str, Any]) -> str:
    grid = settings["grid"]
    first = "" if grid is None else f", after one in each square of {grid}×{grid} (larger squares if fewer are kept)"
    ranking = make_ranking(settings["ranking"], settings["max_iterations"], settings["tolerance"])
    keeps = "the tokens that are most out of date" if ranking is None else ranking.keeps
    staleness = settings["staleness"]
    stale = "" if staleness is None else f", weighted by {STALENESS[staleness].measures}"
    gives = RECOVERIES[settings["recovery"]].gives
    return f"Each attention block keeps {keeps}{stale}{first}. A dropped token gets {gives}."


def write_page(comparison: Comparison, settings: dict[str, Any], device: torch.device, title: str, path: Path) -> Path:
    """Write a page about the result of :func:`atedm.app.comparison.compare` to ``path``, whole or not at all.

    Args:
        settings: from :func:`atedm.app.comparison.describe`.

    Raises:
        OSError: a picture cannot be read, or the page cannot be written.
    """
    folder = path.parent
    recording = comparison.recording
    image = Image.open(folder / comparison.rows[-1]["image"])
    is_trusted = not any(map(is_disturbed, comparison.rows))
    text = _PAGE.substitute(
        title=html.escape(title),
        prompt=html.escape(settings["prompt"]),
        device=html.escape(report.device_name(device)),
        images="".join(_figure(row, folder, is_trusted) for row in comparison.rows),
        figures=_table(COLUMNS.values(), [[report.cell(row.get(key)) for key in COLUMNS] for row in comparison.rows]),
        method=html.escape(_told(recording.kinds, settings)),
        kept=_plotted(recording, image, "kept"),
        scores=_plotted(recording, image, "scores"),
        blocks=_blocks(recording),
        settings="".join(_setting(name, value) for name, value in settings.items()),
    )
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _setting(name: str, value: Any) -> str:
    return f"<dt>{html.escape(name)}</dt><dd>{html.escape(report.cell(value))}</dd>"


def _figure(row: dict[str, Any], folder: Path, is_trusted: bool = True) -> str:
    """A picture with its time. A speed-up is marked as a gain only if its two decimals show one.

    Args:
        is_trusted: whether nothing else was using the machine.
    """
    source = _embedded((folder / row["image"]).read_bytes())
    caption = f"{html.escape(row['name'])}: {row['unet_seconds']:.3g} s in the UNet"
    speedup = row.get("speedup")
    if row["name"] != "full" and speedup is not None:
        how = "gain" if is_trusted and round(speedup, 2) > 1 else "faint"
        doubt = "" if is_trusted else "; something else was using this machine"
        caption += f' <span class="{how}">{speedup:.2f}× as fast{doubt}</span>'
    return f'<figure><img alt="{html.escape(row["name"])}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _plotted(recording: Recording, image: Image.Image, what: str) -> str:
    drawn = io.BytesIO()
    pictures.plot(recording, image, what=what).savefig(drawn, format="png")
    return _embedded(drawn.getvalue())


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(headings: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _blocks(recording: Recording) -> str:
    rows = []
    for name, level, pruned in recording.blocks:
        found = [ranked for ranked in recording.ranked if ranked.block == name]
        counts = [ranked.iterations for ranked in found if ranked.iterations is not None]
        rows.append(
            [
                name,
                str(level),
                f"{found[0].index.shape[1]} of {found[0].tokens}" if found else "all",
                f"{len(found)} of {len(recording.calls)}" if pruned else "never",
                f"{torch.cat(counts).double().mean():.1f}" if counts else "–",
            ]
        )
    headings = ("block", "level", "tokens kept", "UNet calls pruned", "iterations of the ranking, mean over heads")
    return _table(headings, rows)
