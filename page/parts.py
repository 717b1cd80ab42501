"""Parts of a run's page that need no telling: pictures, cost, saliency."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from hallucination.overlays import overlay
from hallucination.scenes import held_out_probes
from rewards import outcome_reward
from scm import Scene, Thing, World, describe, see_again


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------
def picture(description: dict | str, size: int) -> str:
    """The image that `describe_image` described, inside the page, with what is on it as its text."""
    image = see_again(description, size)
    return inline(image, in_words(description), "PNG" if isinstance(description, dict) else "JPEG")


def in_words(description: dict | str) -> str:
    """What an image shows, where that is known; else the name of its file."""
    if not isinstance(description, dict):
        return Path(description).name
    things = [Thing(**thing) for thing in description["things"]]
    return f"{describe(things)}, background: {description['background']}"


def inline(image: Image.Image, alt: str, form: str = "PNG") -> str:
    """An image as HTML that holds its data: a drawing in 128 colours as PNG, or a photo as JPEG."""
    buffer = io.BytesIO()
    (image.quantize(128) if form == "PNG" else image).save(buffer, form, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/{form.lower()};base64,{data}'>"


def wide(label: str) -> str:
    """The opening of a box that scrolls sideways where a table is too wide, by keyboard, too."""
    return f"<div class=wide role=region tabindex=0 aria-label='{html.escape(label)}'>"


# ---------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------
def held_out(rows: list[dict]) -> str:
    """What greedy answers to the user's held-out questions earned, as a table; "" where there are none."""
    names = [name for name in rows[0] if name.startswith("eval_reward")] if rows else []
    measured = [row for row in rows if any(row[name] for name in names)]
    if not measured:
        return ""
    kinds = [name.removeprefix("eval_reward").strip("_") or "all" for name in names]
    heads = "".join(f"<th scope=col>{html.escape(kind)}</th>" for kind in ("after step", *kinds))
    lines = []
    for row in measured:
        cells = "".join(f"<td>{float(row[name]):.3f}</td>" for name in names)
        lines.append(f"<tr><th scope=row>{html.escape(row['step'])}</th>{cells}</tr>")
    return (
        f"<h2>Held-out questions</h2>{wide('held-out questions')}<table class=figures><caption>Mean outcome "
        f"reward of greedy answers to the questions of --eval-data, all of them and by kind. Step 0 is the "
        f"model before training.</caption><tr>{heads}</tr>{''.join(lines)}</table></div>"
    )


def cost(rows: list[dict]) -> str:
    """Mean seconds of a step by stage, and what scoring ran."""

    def mean(column: str) -> float:
        return sum(float(row[column]) for row in rows) / len(rows)

    stages = {name: mean(f"{name}_seconds") for name in ("rollout", "score", "update")}
    listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items())
    ratio = sum(stages.values()) / (stages["rollout"] + stages["update"])
    return (
        f"<p>A step took {listed}: {ratio:.2f} times a step without scoring. Scoring decoded "
        f"{mean('rows_scored'):.0f} rows and ran {mean('scoring_token_forwards'):.0f} token positions.</p>"
    )


# ---------------------------------------------------------------------------------------------
# Saliency
# ---------------------------------------------------------------------------------------------
def saliency(sheets: dict[str, dict], world: World) -> str:
    """Which pixels move the answers, before and after, folded: the run changes little of it."""
    first = next(iter(sheets.values()))
    shares = "; ".join(f"{name} {_share(sheet)}" for name, sheet in sheets.items())
    lines = [
        _maps(row, sheets, of_each, world)
        for row, *of_each in zip(first["rows"], *(s["rows"] for s in sheets.values()), strict=False)
    ]
    heads = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in ("scene", *sheets))
    return (
        f"<details><summary>which pixels move the answers</summary><p class=note>Orange: the gradient of "
        f"the answer's log-probability with respect to the pixels; it is drawn per patch of the image. Its "
        f"share on the background, mean over {first['n']} held-out scenes: {shares}. The background is "
        f"{first['background_area']:.1%} of the pixels: a gradient that looked nowhere in particular would "
        f"have that share there. It says where an answer could be moved, not how sure it is.</p>"
        f"{wide('pixels, before and after')}<table class=maps><tr>{heads}</tr>{''.join(lines)}</table>"
        f"</div></details>"
    )


def _share(sheet: dict) -> str:
    """The share on the background, with its interval where more than one image had an answer."""
    between = sheet["background_share_interval"]
    told = f" (95 % interval {between[0]:.3f} to {between[1]:.3f})" if between else ""
    return f"{sheet['background_share']:.3f}{told}"


def _maps(row: dict, sheets: dict[str, dict], of_each: list[dict], world: World) -> str:
    """One scene: its picture, and for each sheet where the answer comes from, and whether it is right."""
    image, scene = see_again(row["image"], 144), scene_of(row["image"])
    area = 1 - scene.mask().mean()
    cells = [f"<td>{inline(image, in_words(row['image']))}<br>{html.escape(row['question'])}</td>"]
    for name, other in zip(sheets, of_each, strict=True):
        if (other["question"], other["image"]) != (row["question"], row["image"]):
            cells.append("<td>no answer</td>")
            continue
        drawn = inline(overlay(image, np.array(other["mass"], float)), f"gradient, {name}")
        cells.append(
            f"<td>{drawn}<br>{html.escape(other['answer'])} ({_judged(other, scene, world)})<br>"
            f"{other['share']:.0%} of the gradient on the background, which is {area:.0%} of the pixels</td>"
        )
    return f"<tr>{''.join(cells)}</tr>"


def scene_of(description: dict) -> Scene:
    """The scene that `describe_image` described."""
    things = tuple(Thing(**thing) for thing in description["things"])
    return Scene(**{**description, "things": things})


def _judged(row: dict, scene: Scene, world: World) -> str:
    """Whether the answer of a row of the sheet, on the first confounded scenes, is right."""
    for probe in held_out_probes("confounded", 30, world):  # of saliency_sheet
        if (probe.example.question, probe.example.scene) == (row["question"], scene):
            reward = outcome_reward(f"<answer>{row['answer']}</answer>", probe.example)
            return {1: "right", 0: "wrong"}.get(reward, f"F1 {reward:.2f}")
    return "not judged"
