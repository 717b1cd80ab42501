"""The pages are made of the CSVs alone, and what the results page says is in its tables."""

import itertools
import re
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="pip install -r experiments/requirements.txt")

from matplotlib.text import Text
from pages import read_page

from data import DataError
from experiments import build, plots, systems, tables, web
from experiments.claims import ARMS, BEFORE, COLUMNS
from experiments.records import read_csv, write_csv
from page.palette import LIGHT

RESULTS = build.HERE / "results"
PAGE = build.HERE / "README.md"


# -- from CSVs to pages ---------------------------------------------------------------------------
def fill_in(folder):
    """CSVs with a row for everything that a table or figure looks for."""
    wanted = {(arm, step) for arm, of in (ARMS | BEFORE).items() for step in of.steps}
    numbers = {name: 0.5 for name in COLUMNS if name not in ("arm", "seed", "step", "command")}
    rows = [
        numbers | {"arm": arm, "seed": seed, "step": step, "setting": setting, "fog": 0.9, "rho": 0.9,
                   "start": "a", "seconds": step * (2 if "copo" in arm else 1),
                   "flip_rate": 0.1 * seed, "chair_s": 0.1 + 0.01 * seed + (0.05 if "grpo" in arm else 0)}
        for arm, step in sorted(wanted)
        for seed in range(2)
        for setting in ("confounded", "independent")
    ]  # fmt: skip
    for name in ("runs", "repeated"):
        write_csv(folder / f"{name}.csv", rows, COLUMNS)
    for name, keys in {
        "estimator": ["seed", "start", "pairing", "H", "class", "floor", "still", "above_floor", "mean",
                      "expected", "variance", "correlation_with_lower_bound", "token_forwards", "lower",
                      "coupled", "independent", "upper"],
        "mask": ["seed", "start", "n", "mask", "class", "truth", "score", "bias", "error", "correlation"],
        "credit": ["seed", "start", "pairing", "class", "sufficiency", "necessity", "causal_reward"],
    }.items():  # fmt: skip
        rows = [
            dict.fromkeys(keys, 0.3)
            | {"seed": 0, "start": "a", "pairing": pairing, "H": 4, "class": kind, "mask": mask}
            for pairing in ("coupled", "independent")
            for kind in ("all", "open", "auc", *tables.CLASSES, *(f"{k}, open" for k in tables.CLASSES))
            for mask in tables.MASKS
        ]  # fmt: skip
        write_csv(folder / f"{name}.csv", rows, tuple(keys))
    columns = ("scenes", "figure", "seed", "warm_start", "grpo", "copo")
    of_scenes = "independent scenes (n = 3)"
    first = [
        dict(zip(columns, (of_scenes, heading, seed, 0.1, 0.2, 0.3 + 0.1 * seed), strict=True))
        for seed in (0, 1)
        for heading in (
            "accuracy", "POPE F1, adversarial", "CHAIR_S  (lower is better)", "caption recall",
            "flip rate under do(L_s)  (lower is better)",
        )
    ]  # fmt: skip
    write_csv(
        folder / "first.csv", [*first, {"figure": "seconds", "seed": 0, "copo": "90"}], columns
    )
    real = [{**row, "grpo": "0.5", "warm_start": "0.25"} for row in first if row.get("scenes")]
    real += [{"figure": name, "seed": 0, "grpo": g, "copo": c} for name, g, c in (
        ("seconds per step: rollout", 1, 1), ("seconds per step: score", 0, 2),
        ("seconds per step: update", 3, 3), ("hours of training", 0.5, 1.5),
    )]  # fmt: skip
    write_csv(folder / "real.csv", real, columns)
    for name, row in {
        "memory": {"model": "M", "generations": 8, "tokens": 256, "trained": "all", "stays_gb": "1.5",
                   "peak_gb": "2.5"},
        "baselines": {"system": "hadpo", "world": "fog", "seed": "0", "scenes": "150", "start": "a",
                      "seconds": "", **dict.fromkeys(systems.FIGURES, "0.5")},
        "paper": {"model": "M", "method": "COPO", "chair_s": "1.5", "chair_i": "", "pope_f1": "80.0"},
    }.items():  # fmt: skip
        write_csv(folder / f"{name}.csv", [row], tuple(row))
    keys = ("method", "prompts", "length", "share", "rate", "optimizer", "wrong", "wrong_low", "wrong_high",
            "steps_ratio", "steps_low", "steps_high", "words_ratio", "words_low", "words_high")  # fmt: skip
    row = dict.fromkeys(keys, 0.5) | {"method": "GRPO", "prompts": 1, "length": 32, "rate": 0.1}
    write_csv(folder / "credit_map.csv", [row | {"optimizer": "Adam"}], keys)
    asked = [
        {"policy": policy, "question": question, "way": way, "auc": auc, "per_grpo_step": 0.5,
         "correlation": 0.25}
        for policy in ("short", "long")
        for question, ways in tables.ASKED.items()
        for way in ways
        for auc in (0.5, 0.75)
    ]  # fmt: skip
    write_csv(folder / "asking.csv", asked, tuple(asked[0]))
    level = {"arm": "copo, counting, B 1", "level": "0.7", "step": "50", "token_forwards": "9000"}
    write_csv(folder / "levels.csv", [level], tuple(level))
    columns = ("command", "figure", "value", "way")
    points = itertools.product(
        ("reasoning_tokens 16", "num_continuations 1", "num_generations 4"),
        ("(d) shared, independent", "(e) shared, coupled"),
    )
    grown = f"benchmark.py {tables.GROWTH}"
    rows = [(grown, f"token_forwards, {value}", 100, way) for value, way in points]
    rows.append(
        ("benchmark.py step --model runs/first/checkpoint --repeats 20", "copo_over_grpo", 1.5, "")
    )
    write_csv(folder / "cost.csv", [dict(zip(columns, r, strict=True)) for r in rows], columns)
    rows = [(f"experiments/card.py {tables.ON_CARD[0]}", "floor_seconds", 0.5, "rollout"),
            (f"experiments/card.py {tables.ON_CARD[0]}", "step_seconds", 20.0, "rollout")]  # fmt: skip
    write_csv(folder / "card.csv", [dict(zip(columns, r, strict=True)) for r in rows], columns)


@pytest.fixture
def made(tmp_path):
    """A folder of CSVs and two pages with a place for every table; returns the flags of build.py."""
    fill_in(tmp_path)
    names = list(build.all_tables(tmp_path))
    for name, of_page in (("README.md", names[:3]), ("other.md", names[3:])):
        marks = (f"<!-- results {name} -->\nstale\n<!-- end -->\n" for name in of_page)
        (tmp_path / name).write_text("# Title\n" + "".join(marks))
    pages = [str(tmp_path / "README.md"), str(tmp_path / "other.md")]
    flags = ["--results", str(tmp_path), "--figures", str(tmp_path / "figures")]
    return [*flags, "--html", str(tmp_path / "page.html"), "--pages", *pages]


def test_tables_figures_and_page_come_from_the_csvs_alone(made, tmp_path, monkeypatch):
    assert build.main(made) == 0
    text = (tmp_path / "README.md").read_text() + (tmp_path / "other.md").read_text()
    assert "stale" not in text and text.startswith("# Title\n")
    (early,) = (line for line in text.splitlines() if line.startswith("| COPO, 20 steps | 2 |"))
    assert early.split(" | ")[2] == "0.105 ± 0.064"
    assert early.split(" | ")[5] == "-0.050 ± 0.000 (p < 0.01)"  # of every seed the same difference
    (at_half,) = (line for line in text.splitlines() if line.startswith("| 0.5 | 2 |"))
    assert at_half.split(" | ")[8] == "-0.050 ± 0.000 (p < 0.01)"  # COPO less GRPO, CHAIR_S
    for cell in (
        "| accuracy | 0.100 | 0.200 | 0.350 |", "| 1 | 0.1 | 0.2 | 0.4 |",
        "| minutes, seed 0 (COPO: with the warm start) |  |  | 1.5 |", "| 128 |  | 20.0 s | 40 |",
        "| a step, in GRPO steps |  | 1 | 1.50 |",
        "| sufficiency: words, H 4 | 0.5 | 0.25 ± 0.00 | 0.62 ± 1.59 |",
        "| M | 8 | 256 | all | 1.5 GB | 2.5 GB |", "| 1.5 | – | 80.0 |", "**1.50×**",
    ):  # fmt: skip
        assert cell in text
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    light = {name for name in drawn if not name.endswith("-dark.png")}
    assert len(light) == 11 and {f"{name[:-4]}-dark.png" for name in light} == drawn - light
    read_page((tmp_path / "page.html").read_text())
    pages = {path: path.read_text() for path in (tmp_path / "README.md", tmp_path / "other.md")}
    assert build.fill(pages, build.all_tables(tmp_path)) == pages  # nothing is left to be done


def test_the_page_says_the_verdicts_of_the_results_page_and_shows_the_figure_of_the_readers_scheme(
    tmp_path,
):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"light")
    picture.with_stem("a-dark").write_bytes(b"dark")
    table = "| a |  |\n| --- | --- |\n| <x> | 1 |\n| y | +0.5 ± 0.1 (p < 0.01) |"
    text = "**All\nin all.** More.\n### 1. Is it?\n*(i)* **Not\nhere.** **x**"
    text += '<img alt="A & b" src="figures/claim-1-a.png">'
    page = web.page([web.Section("1-a", picture, table, "From there.")], text)
    told = read_page(page)
    assert (
        "All in all." in told and "1. Is it?" in told and told.count("Not here.") == 2
    )  # in the list, too
    assert "alt='A &amp; b' src='data:image/png;base64,bGlnaHQ='" in page
    assert re.search(r"prefers-color-scheme: dark\)' srcset='data:image/png;base64,ZGFyaw=='", page)
    assert "<th scope=row>&lt;x&gt;</th><td>1</td>" in page and "<th scope=col>what</th>" in page
    # a line may end before a p-value, but not within an interval
    assert "<td><span>+0.5 ± 0.1</span> (p &lt; 0.01)</td>" in page
    with pytest.raises(DataError, match="claim-1-a"):
        web.page([web.Section("1-a", picture, table, "")], "**All.** and no picture")


def test_a_table_without_a_place_or_with_two_and_a_place_without_a_table_are_refused(
    made, tmp_path, capsys
):
    with pytest.raises(DataError, match="0 places for the table '1-shortcut'"):
        build.fill({PAGE: "text"}, {"1-shortcut": "| a |"})
    place = "<!-- results 1-shortcut -->\n<!-- end -->\n"
    with pytest.raises(DataError, match="2 places for the table '1-shortcut'"):
        build.fill({PAGE: place, RESULTS: place}, {"1-shortcut": "| a |"})
    with pytest.raises(DataError, match="no table is called '1-shortcut'"):
        build.fill({PAGE: place}, {})
    (tmp_path / "other.md").write_text("no place")
    assert build.main(made) == 2 and "0 places" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()  # nothing is drawn, and no page is touched
    assert "stale" in (tmp_path / "README.md").read_text()


def test_no_table_is_made_of_a_missing_csv_or_of_two_warm_starts(tmp_path, capsys):
    fill_in(tmp_path)
    rows = read_csv(tmp_path / "mask.csv")
    write_csv(tmp_path / "mask.csv", [row | {"start": "b"} for row in rows], tuple(rows[0]))
    with pytest.raises(DataError, match="different warm starts"):
        build.claims(tmp_path)
    for name in build.NEEDED:
        fill_in(tmp_path)
        (tmp_path / f"{name}.csv").unlink()
        assert build.main(["--results", str(tmp_path)]) == 2
        assert f"{name}.csv: not there" in capsys.readouterr().err
    assert build.main(["--compare", str(tmp_path / "none")]) == 2
    assert "make results QUICK=1" in capsys.readouterr().err


def test_a_quick_run_is_shown_beside_the_committed_rows(tmp_path):
    for name, value in (("quick", 0.2), ("results", 0.1)):
        row = {"arm": "copo", "seed": 0, "step": 40, "setting": "independent", "chair_s": value}
        write_csv(tmp_path / name / "runs.csv", [row], COLUMNS)
    text = build.compare(tmp_path / "quick", tmp_path / "results")
    assert "CHAIR_S" in text and "0.2" in text and "0.1" in text


def test_building_the_page_loads_neither_torch_nor_transformers():
    check = "import sys, experiments.build; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=build.HERE.parent).returncode == 0


# -- what is committed ------------------------------------------------------------------------------
def test_committed_rows_name_their_command_and_the_commit_they_come_from():
    assert set(build.NEEDED) <= {path.stem for path in RESULTS.glob("*.csv")}
    for path in RESULTS.glob("*.csv"):
        rows = read_csv(path)
        if path.stem == "paper":
            assert rows and all(row["source"] for row in rows)
            continue
        assert rows and all(row["command"] and row["commit"] for row in rows), path
        assert not any(row["commit"].endswith("+") for row in rows), path


def test_the_pages_tables_are_those_of_the_committed_csvs():
    found = build.all_tables(RESULTS)
    assert "nan" not in "".join(found.values())
    pages = {path: path.read_text(encoding="utf-8") for path in build.PAGES}
    assert build.fill(pages, found) == pages


TABLE = re.compile(r"<!-- results .*?<!-- end -->", re.DOTALL)
SETTING = re.compile(r"(?:\b(?:p|confounding|fog)|λ(?:_[sn])?|[βεκπ]) *[=<>]? *\d+\.\d+")
ELSEWHERE = "What the paper reports"  # holds figures of the paper that no CSV has


def sections():
    """Heading -> text, of the results page; what stands above the first heading goes with the title."""
    text = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^#+ (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def cells(text):
    """Numbers with decimals, signed where they say so, each with its interval where it has one."""
    text = text.replace("−", "-")
    return re.findall(r"(?<![\w.])([+-]?\d+\.\d+)(?:\s±\s(\d+\.\d+))?(?![\w.])", text)


def near(said, known):
    """Whether a number of the prose is a cell's, rounded to its own digits; so of the interval it names."""
    known = known if said[0][0] in "+-" else (known[0].lstrip("+-"), known[1])
    return all(
        not s or (k and abs(float(s) - float(k)) <= 0.5 * 10 ** -len(s.split(".")[1]) + 1e-9)
        for s, k in zip(said, known, strict=True)
    )


def test_every_decimal_in_the_prose_of_the_results_page_is_near_one_of_its_section_s_tables():
    """A section without a table may quote any. Settings are let through by name: "λ = 0.35", "p < 0.05".

    A number that is near none is stale; one that is near another cell passes.
    """
    everywhere = TABLE.findall(PAGE.read_text(encoding="utf-8"))
    for heading, text in sections().items():
        known = [cell for table in TABLE.findall(text) or everywhere for cell in cells(table)]
        for said in cells(SETTING.sub("", TABLE.sub("", text))):
            assert heading == ELSEWHERE or any(near(said, cell) for cell in known), (heading, said)


def test_a_claim_is_said_in_at_most_150_words():
    claims = {heading: text for heading, text in sections().items() if re.match(r"\d\. ", heading)}
    assert len(claims) == 8
    for heading, text in claims.items():
        prose = re.sub(r"<picture>.*?</picture>|<details>.*?</details>", "", text, flags=re.DOTALL)
        assert len(prose.split()) <= 150, (heading, len(prose.split()))
        assert TABLE.search(text) and 'src="figures/claim-' in text and "*Caveat.*" in text


def test_every_figure_is_shown_somewhere_and_has_a_text_and_a_version_for_the_dark():
    shown = []
    for path in build.PAGES:
        text = path.read_text(encoding="utf-8")
        shown += re.findall(
            r'<img alt="[^"]{20,}" src="[a-z/]*figures/([\w-]+)\.png"(?: width="\d+")?></picture>',
            text,
        )
    light = {
        path.stem for path in (build.HERE / "figures").glob("*.png") if "-dark" not in path.stem
    }
    assert sorted(shown) == sorted(light)
    assert all((build.HERE / "figures" / f"{name}-dark.png").exists() for name in shown)


def test_what_figures_say_is_read_on_a_phone():
    """At 358 px of width, 9 px or more; but for the exponents of powers of ten."""
    costs, ways = tables.Costs(RESULTS / "cost.csv"), read_csv(RESULTS / "asking.csv")
    draws = {name: claim.draw for name, claim in build.claims(RESULTS).items()}
    draws |= {"growth": lambda scheme: plots.growth(costs, scheme)}
    draws |= {"asking": lambda scheme: plots.asking(ways, scheme)}
    mapped = read_csv(RESULTS / "credit_map.csv")
    draws |= {"credit_map": lambda scheme: plots.credit_map(mapped, scheme)}
    for name, draw in draws.items():
        figure = draw(LIGHT)
        figure.draw_without_rendering()
        written = [text for text in figure.findobj(Text) if text.get_text().strip()]
        scale = 358 / figure.get_figwidth() / 72  # pixels of a point
        assert len(written) > 10, name
        for text in written:
            assert text.get_fontsize() * scale >= 9, (name, text.get_text())
            box = text.get_window_extent()
            if (
                " " in text.get_text()
            ):  # ticks beyond an axis' end have a text, too, that is not drawn
                assert box.x0 >= 0 and box.x1 <= figure.bbox.width, (name, text.get_text())
        plots.plt.close(figure)


def test_only_the_palette_knows_colours():
    for name in ("plots.py", "web.py"):
        assert not re.search(r"#[0-9a-f]{6}\b|color=[\"']", (build.HERE / name).read_text()), name
