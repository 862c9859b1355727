"""Write the HTML page of `latentvae prove`, from proof.json and the folder `pictures`."""

import html
import json
from pathlib import Path
from typing import Any

from latentvae.files import read_text

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Generator proof</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100%; image-rendering: pixelated }}
figure {{ display: inline-block; width: 30rem; max-width: 100%; margin: .5rem 1rem .5rem 0;
          vertical-align: top }}
.yes {{ color: #176d2c }} .no {{ color: #a11 }} .open {{ color: #666 }}
</style>
<h1>Generator proof</h1>
<p>The same small generator was trained on each code below, with {updates} updates of {batch_size}
images. A code with a lower distance is better <strong>for this generator on this data</strong>.
With another generator, a longer training or other images, the order may differ.</p>
<p>Setting: {training_images:,} training images and {held_out_images:,} held-out images at
{resolution} px, {samples:,} samples of each generator, seeds {seeds}.</p>
{sections}
<h2>What the columns mean</h2>
<ul>
<li><b>distance</b>: kernel distance between samples and held-out pictures ({kernel}). Features:
{features}. Lower is better. ± is the standard deviation over seeds of the generator.</li>
<li><b>class</b>: share of the samples, drawn with guidance {guidance:g}, whose class is that of
most of their ten nearest training pictures. All other columns are for samples without
guidance.</li>
<li><b>copies</b>: share of the samples that are nearer to the reconstruction of a training picture
than 99 % of the held-out reconstructions are. About 0.01 is normal.</li>
<li><b>shift</b>: shift of the noise levels. It was chosen by the distance to the training pictures,
with a seed that is not shown.</li>
</ul>
</html>
"""

CHECKS = {
    "better_than_noise": "The code is better than the same code with noise",
    "better_than_shuffled_labels": (
        "Samples fit their class better than after a training with shuffled classes"
    ),
    "better_than_blocks": "The code is better than mean colours of blocks with as many values",
    "better_than_shuffled_tokens": "The code is better than tokens in a random order",
    "nearer_to_reconstruction_than_to_untrained": (
        "The distance of the samples is nearer to that of reconstructions than to that of an "
        "untrained generator"
    ),
    "classes_above_chance": "The classes of samples are recognised more often than by chance",
    "no_copies": "Samples are not nearer to training pictures than held-out pictures are",
}
ANSWERS = {True: ("yes", "yes"), False: ("no", "no"), None: ("open", "not measured")}


def write_page(folder: Path) -> Path:
    """Write `proof.html` into a folder of `latentvae prove`. Return the path of the page."""
    proof = json.loads(read_text(folder / "proof.json"))
    protocol = proof["protocol"]
    sections = "\n".join(_section(proof, name, folder) for name in proof["latents"])
    seeds = ", ".join(map(str, protocol["seeds"]))
    page = PAGE.format(**{**protocol, "seeds": seeds}, sections=sections)
    path = folder / "proof.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(proof: dict[str, Any], name: str, folder: Path) -> str:
    """Return the table, the checks and the pictures for one folder of latents or tokens."""
    floors, words = proof["floors"][name], proof["protocol"]["variants"][name]
    rows = {
        "real training pictures": floors["real"],
        "their reconstructions": floors["reconstruction"],
        "held-out reconstructions": floors["held_out_reconstruction"],
        words["code"]: proof["latents"][name],
    }
    rows |= {f"control: {words[n]}": row for n, row in proof["controls"][name].items()}
    rows["untrained generator"] = floors["untrained"]
    head = "<tr><th>pictures<th>distance<th>class<th>copies<th>shift</tr>"
    table = "\n".join(_row(label, row) for label, row in rows.items())

    checks = "\n".join(
        f'<li>{text}: <span class="{ANSWERS[value][0]}">{ANSWERS[value][1]}</span></li>'
        for key, text in CHECKS.items()
        if (value := proof["checks"][name].get(key, "absent")) != "absent"
        and (value is not None or key.removeprefix("better_than_") in words)
    )
    pictures = "".join(
        f'<figure><img src="pictures/{html.escape(name)}/{path.name}" alt="{path.stem}">'
        f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
        for path in sorted((folder / "pictures" / name).glob("*.png"))
    )
    kind = proof["protocol"]["kinds"][name]
    return (
        f"<h2>{html.escape(name)} ({kind})</h2>\n<table>{head}{table}</table>\n"
        f"<ul>{checks}</ul>\n<p>Samples of the first seed, not selected:</p>\n{pictures}"
    )


def _row(label: str, row: dict[str, Any]) -> str:
    kd = row.get("kd")
    if isinstance(kd, dict):
        distance = f"{kd['mean']:.4f}" + ("" if kd["std"] is None else f" ± {kd['std']:.4f}")
    else:
        distance = "" if kd is None else f"{kd:.4f}"
    accuracy = f"{row['class_accuracy']:.3f}" if "class_accuracy" in row else ""
    copies = f"{row['copies']:.3f}" if "copies" in row else ""
    shift = f"{row['shift']:g}" if "shift" in row else ""
    cells = "".join(f"<td>{cell}" for cell in (distance, accuracy, copies, shift))
    return f"<tr><td>{html.escape(label)}{cells}</tr>"
