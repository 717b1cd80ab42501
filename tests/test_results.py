"""Experiments and what is made of their CSVs: statistics by hand, rows once, tables and figures from rows."""

import math
import re

import pytest

import experiments
import results
import tables
from data import DataError
from evaluate import compare_table
from experiments import ARMS, BEFORE, COLUMNS, FIGURES, Arm
from records import read_csv, write_csv


def test_the_whole_set_s_time_is_that_of_its_last_steps_and_its_checkpoints(tmp_path):
    rows = [
        {"arm": "grpo", "seed": 0, "step": 20, "seconds": 1800, "measuring_seconds": ""},
        {"arm": "grpo", "seed": 0, "step": 40, "seconds": 3600, "measuring_seconds": 900},
        {"arm": "copo", "seed": 0, "step": 40, "seconds": 1800, "measuring_seconds": 900},
        {"arm": "warm start", "seed": "", "step": 0},
    ]
    both = [row | {"setting": s} for row in rows for s in ("independent", "confounded")]
    write_csv(tmp_path / "runs.csv", both, COLUMNS)
    told = tables.total(tables.Runs(tmp_path))
    assert told.startswith("2 trainings; 1.5 hours of training on a core each, and 900 seconds")
    assert "each of 3 checkpoints (timed for 2): 1.1 hours on two cores" in told  # (1.5 + 0.75) / 2


def test_student_s_interval_and_paired_test_by_hand():
    # 1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), t(4) = 2.776 -> 2.776 * sqrt(2.5 / 5) = 1.963
    mean, half = tables.interval([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(1.963, abs=1e-3)
    # differences 1, 2, 3, 4, 5 over 0: t = 3 / sqrt(0.5) = 4.243, p = 0.0132
    a, b = {str(i): i + 1.0 for i in range(5)}, {str(i): 0.0 for i in range(5)}
    assert tables.paired(a, b)[2:] == (pytest.approx(0.0132, abs=1e-4), 5)
    assert tables.paired(a, a)[2] == 1  # no difference at all
    assert math.isnan(tables.interval([])[0]) and math.isnan(tables.interval([1.0])[1])


def test_only_seeds_that_both_have_are_paired():
    assert tables.paired({"0": 1.0, "1": 3.0, "7": 9.0}, {"1": 1.0, "0": 1.0})[0] == 1.0


def test_every_arm_is_a_command_that_train_takes(tmp_path):
    for name, arm in ARMS.items():
        args = experiments.train.parse_arguments(arm.command(3, tmp_path / name))
        experiments.train.check_arguments(args)
        assert (args.seed, args.steps, args.fog) == (3, arm.steps[-1], arm.fog)
        assert args.confounding == arm.rho and args.in_words == arm.in_words
        assert all(step % args.save_steps == 0 for step in arm.steps)


def test_every_arm_begins_at_a_warm_start_that_is_measured_and_has_a_place_in_a_table():
    starts = {(arm.fog, arm.in_words) for arm in BEFORE.values()}
    assert all((arm.fog, arm.in_words) in starts for arm in ARMS.values())
    rows = (*tables.REMEDIES, *tables.EARLY, *tables.COLOURS)
    shown = {row.arm for row in rows} | {
        arm for group in tables.SENSITIVITY.values() for arm in group
    }
    shown |= {arm for of_method in tables.CONFOUNDED.values() for arm in of_method.values()}
    assert set(ARMS) - shown == {"grpo, in words", "grpo, no existence"}  # of claim 1 alone
    assert all(row.step in (ARMS | BEFORE)[row.arm].steps for row in rows if row.step is not None)
    assert all((row.than or row.step) in ARMS[row.grpo].steps for row in rows if row.grpo)
    assert all(step in ARMS[name].steps for name, step in experiments.QUICK.items())


def test_rows_survive_the_file_with_commas_in_their_names(tmp_path):
    rows = [{"arm": "grpo, in words", "seed": 1, "step": 40, "chair_s": 0.123456789}]
    write_csv(tmp_path / "runs.csv", rows, COLUMNS)
    (row,) = read_csv(tmp_path / "runs.csv")
    assert (row["arm"], row["seed"], row["chair_s"], row["flip_rate"]) == (
        "grpo, in words", "1", "0.12346", "",
    )  # fmt: skip
    assert read_csv(tmp_path / "none.csv") == []


@pytest.fixture
def tiny(monkeypatch, speaker):
    """Experiments on a starting point that is there already, with runs that take seconds."""
    small = ("--batch-size", "2", "--num-generations", "3", "--max-completion-length", "24")
    arms = {
        "grpo": Arm((*experiments.GRPO, *small), (1, 2), 0.0),
        "copo": Arm(small, (1, 2), 0.0),
    }
    monkeypatch.setattr(experiments, "ARMS", arms)
    monkeypatch.setattr(experiments, "BEFORE", {"warm start": Arm(steps=(0,), fog=0.0)})
    asked_in = []
    for module in (experiments, experiments.train):
        monkeypatch.setattr(
            module, "warm_start", lambda cache, _: asked_in.append(cache) or speaker
        )
    monkeypatch.setattr(experiments, "asked_in", asked_in, raising=False)
    return arms


def test_a_run_gives_a_row_for_each_checkpoint_and_kind_of_scenes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "saliency_sheet", lambda *_, **__: {"background_share": 0.5})
    rows = experiments.run_arm("copo", tiny["copo"], 0, tmp_path, scenes=1)
    assert [(r["step"], r["setting"]) for r in rows] == [
        (1, "confounded"), (1, "independent"), (2, "confounded"), (2, "independent"),
    ]  # fmt: skip
    assert all(row[name] >= 0 for row in rows for name in FIGURES)
    assert all(set(row) < set(COLUMNS) for row in rows)
    assert rows[0]["seconds"] < rows[-1]["seconds"]
    again = experiments.run_arm("copo", tiny["copo"], 0, tmp_path, scenes=1)
    assert all(row.pop("measuring_seconds") > 0 for row in (*rows, *again))
    assert again == rows  # nothing is trained again
    assert set(experiments.asked_in) == {tmp_path}  # one cache: the warm start is made once
    before = experiments.run_arm("warm start", experiments.BEFORE["warm start"], "", tmp_path, 1)
    assert [row["step"] for row in before] == [0, 0]


def test_a_run_that_was_stopped_is_not_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.train, "main", lambda command: 0)  # as after Ctrl-C
    with pytest.raises(RuntimeError, match="ended at step 0"):
        experiments.run_arm("copo", tiny["copo"], 0, tmp_path, scenes=1)


class Here:
    """A pool that runs its jobs at once, in this process."""

    def __init__(self, *_, **__):
        pass

    def submit(self, work, *given):
        job = experiments.Future()
        try:
            job.set_result(work(*given))
        except RuntimeError as error:
            job.set_exception(error)
        return job

    def shutdown(self, cancel_futures):
        assert cancel_futures


def test_a_run_that_the_csv_holds_is_not_run_again(tiny, tmp_path, monkeypatch):
    ran, start = [], "a"

    def run(name, arm, seed, work, scenes):
        ran.append((name, seed))
        if (name, seed) == ("copo", 0):
            raise RuntimeError("training ended at step 1")
        facts = {"arm": name, "seed": seed, "setting": "independent", "start": start}
        return [facts | {"step": step} for step in arm.steps]

    monkeypatch.setattr(experiments, "in_worker", run)
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Here)
    given = tmp_path / "runs.csv", tmp_path, 1, 1
    experiments.run_all({"grpo": tiny["grpo"]}, 2, *given)
    assert ran == [("warm start", ""), ("grpo", 0), ("grpo", 1)]
    ran.clear()
    (failed,) = experiments.run_all(tiny, 2, *given)
    assert ran == [("warm start", ""), ("copo", 0), ("copo", 1)]
    assert failed.startswith("copo 0: training ended at step 1") and "copo-0.log" in failed
    rows = read_csv(tmp_path / "runs.csv")
    assert sorted((row["arm"], row["seed"], row["step"]) for row in rows) == [
        ("copo", "1", "1"), ("copo", "1", "2"), ("grpo", "0", "1"), ("grpo", "0", "2"),
        ("grpo", "1", "1"), ("grpo", "1", "2"), ("warm start", "", "0"),
    ]  # fmt: skip
    assert all(row["commit"] for row in rows)
    ran.clear()
    longer = {"grpo": experiments.replace(tiny["grpo"], steps=(1, 2, 3))}
    assert experiments.run_all(longer, 1, *given) == []
    assert ran == [
        ("warm start", ""),
        ("grpo", 0),
    ]  # for the step it lacks; its rows are not doubled
    assert len(read_csv(tmp_path / "runs.csv")) == len(rows) + 1
    ran.clear()
    start = "b"  # as on another machine
    (failed,) = experiments.run_all(tiny, 3, *given)
    assert ran == [("warm start", "")] and "processors round differently" in failed


def fill_in(folder):
    """CSVs with a row for everything that a table or figure looks for."""
    rows = (*tables.REMEDIES, *tables.EARLY, *tables.COLOURS)
    wanted = {(row.arm, row.step) for row in rows if row.step is not None}
    wanted |= {(arm, 40) for arm in ARMS} | {(arm, 0) for arm in BEFORE}
    numbers = {name: 0.5 for name in COLUMNS if name not in ("arm", "seed", "step", "command")}
    rows = [
        numbers | {"arm": arm, "seed": seed, "step": step, "setting": setting, "fog": 0.9, "rho": 0.9,
                   "start": "a", "seconds": step * (2 if "copo" in arm else 1),
                   "flip_rate": 0.1 * seed, "chair_s": 0.1 + 0.01 * seed + (0.05 if "grpo" in arm else 0)}
        for arm, step in sorted(wanted)
        for seed in range(2)
        for setting in ("confounded", "independent")
    ]  # fmt: skip
    write_csv(folder / "runs.csv", rows, COLUMNS)
    for name, keys in {
        "estimator": ["seed", "start", "pairing", "H", "class", "floor", "still", "above_floor",
                      "mean", "expected", "variance",
                      "correlation_with_lower_bound", "token_forwards", "lower", "coupled",
                      "independent", "upper"],
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
    first = {
        "scenes": "confounded scenes (n = 3)",
        "figure": "accuracy",
        "before": "0.1",
        "after": "0.2",
    }
    write_csv(folder / "first.csv", [first, {"figure": "seconds", "after": "90"}], tuple(first))
    memory = {
        "model": "M",
        "generations": 8,
        "tokens": 256,
        "trained": "all",
        "stays_gb": "1.5",
        "peak_gb": "2.5",
    }
    write_csv(folder / "memory.csv", [memory], tuple(memory))
    paper = {"model": "M", "method": "COPO", "chair_s": "1.5", "chair_i": "", "pope_f1": "80.0"}
    write_csv(folder / "paper.csv", [paper], tuple(paper))
    cost = {
        "command": "benchmark.py step --model runs/first/checkpoint",
        "figure": "copo_over_grpo",
    }
    write_csv(
        folder / "cost.csv",
        [cost | {"value": 1.5, "way": ""}],
        ("command", "figure", "value", "way"),
    )


def test_tables_figures_and_page_come_from_the_csvs_alone(tmp_path):
    fill_in(tmp_path)
    marks = [
        f"<!-- results {name} {i} -->\nold\n<!-- end -->\n"
        for name, claim in results.claims(tmp_path).items()
        for i in range(1, len(claim.tables) + 1)
    ] + [f"<!-- results {name} -->\n<!-- end -->\n" for name in results.all_tables(tmp_path)]
    readme, page = tmp_path / "README.md", tmp_path / "page.html"
    readme.write_text("# Title\n" + "".join(marks))
    flags = ["--results", str(tmp_path), "--figures", str(tmp_path / "figures")]
    flags += ["--readme", str(readme), "--page", str(page)]
    assert results.main(flags) == 0
    text = readme.read_text()
    assert "old" not in text and text.startswith("# Title\n")
    assert "| COPO | 2 | -0.050 ± 0.000 (p < 0.01) |" in text  # of every seed the same difference
    assert "| COPO, less GRPO in the same time | 2 | -0.050" in text  # its 80 steps
    (early,) = (line for line in text.splitlines() if line.startswith("| COPO, 5 steps | 2 |"))
    assert early.split(" | ")[4] == "0.105 ± 0.064"
    assert early.split(" | ")[6] == "-0.050 ± 0.000 (p < 0.01)"
    (at_half,) = (line for line in text.splitlines() if line.startswith("| 0.5 | 2 |"))
    assert at_half.split(" | ")[8] == "-0.050 ± 0.000 (p < 0.01)"  # COPO less GRPO, CHAIR_S
    for cell in (
        "  accuracy   ",
        "| M | 8 | 256 | all | 1.5 GB | 2.5 GB |",
        "| 1.5 | – | 80.0 |",
        "**1.50×**",
    ):
        assert cell in text
    assert len(list((tmp_path / "figures").glob("claim-*.png"))) == 7
    assert page.read_text().count("<img") == 7
    assert "<tr><th><th>scenes<th>flip rate" in page.read_text()  # the empty heading stays
    found = {
        "1-shortcut 1": results.sourced(results.claims(tmp_path)["1-shortcut"].tables[0], "runs")
    }
    assert results.fill(text, found) == text  # filled once more, it stays as it is


def test_no_table_is_made_of_a_missing_csv_or_of_two_warm_starts(tmp_path, capsys):
    fill_in(tmp_path)
    rows = read_csv(tmp_path / "mask.csv")
    write_csv(tmp_path / "mask.csv", [row | {"start": "b"} for row in rows], tuple(rows[0]))
    with pytest.raises(DataError, match="different warm starts"):
        results.claims(tmp_path)
    for name in results.NEEDED:
        fill_in(tmp_path)
        (tmp_path / f"{name}.csv").unlink()
        assert results.main(["--results", str(tmp_path)]) == 2
        assert f"{name}.csv: not there" in capsys.readouterr().err


def test_equal_time_is_the_first_checkpoint_that_took_as_long_as_40_steps_of_copo(tmp_path):
    rows = [
        {"arm": arm, "seed": seed, "step": step, "setting": "independent", "seconds": time,
         **dict.fromkeys(("chair_s", "recall", "pope_adversarial", "flip_rate"), step)}
        for arm, seed, step, time in (
            ("copo", 0, 40, 100), ("copo", 0, 80, 200), ("copo", 1, 40, 70),
            ("grpo", 0, 40, 60), ("grpo", 0, 80, 90), ("grpo", 0, 100, 120),
            ("grpo", 1, 40, 60), ("grpo", 1, 80, 81), ("grpo", 1, 100, 110),
        )
    ]  # fmt: skip
    write_csv(tmp_path / "runs.csv", rows, COLUMNS)
    runs = tables.Runs(tmp_path)
    assert runs.values("grpo", None, "independent", "chair_s") == {
        "0": 80,
        "1": 80,
    }  # 171 s, not 120
    write_csv(tmp_path / "runs.csv", rows[:-2], COLUMNS)
    assert tables.Runs(tmp_path).equal_time("grpo") is None  # a seed has none that took so long
    (line,) = (
        line
        for line in tables.against_grpo(runs, "independent").splitlines()
        if "same time" in line
    )
    assert line.startswith("| COPO, less GRPO in the same time | 2 | -40.000")


def test_the_slope_on_rho_is_that_of_each_seed_s_own_line(tmp_path):
    values = {
        "0": lambda rho: 0.1 + 0.2 * rho,
        "1": lambda rho: 0.3 - 0.1 * rho,
        "2": lambda rho: 0.0,
    }
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "step": 40,
            "setting": "independent",
            "chair_s": line(float(rho)),
        }
        for seed, line in values.items()
        for rho, arm in tables.CONFOUNDED["grpo"].items()
        if (seed, rho) != ("2", "0.5")  # a seed that lacks a run has no line
    ]
    write_csv(tmp_path / "runs.csv", rows, COLUMNS)
    slopes = tables.slopes_on_rho(tables.Runs(tmp_path), "grpo", "chair_s")
    assert slopes == {"0": pytest.approx(0.2, abs=1e-3), "1": pytest.approx(-0.1, abs=1e-3)}


def test_the_first_run_is_kept_as_it_was_printed_and_not_run_again(tmp_path, monkeypatch):
    figures = dict.fromkeys(("accuracy", "chair_s", "chair_i", "recall", "flip_rate"), 0.25)
    f1 = {"f1": 0.75, "yes_ratio": 0.5}
    figures |= {"n": 3, "length": 7, "pope": {"random": f1, "popular": f1, "adversarial": f1}}
    measured = {
        when: dict.fromkeys(("confounded", "independent"), figures) for when in ("before", "after")
    }
    ran = []

    def trained(command):
        ran.append(command)
        (tmp_path / "runs" / "first" / "run").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "first" / "run" / "evaluation.json").write_text(
            experiments.json.dumps(measured)
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments.train, "main", trained)
    path = tmp_path / "results" / "first.csv"
    del measured["after"]  # as after Ctrl-C
    assert experiments.first_run(path, tmp_path / "runs") and not path.exists()
    measured["after"] = measured["before"]
    assert experiments.first_run(path, tmp_path / "runs") == []
    assert experiments.first_run(path, tmp_path / "runs") == [] and len(ran) == 2
    rows = read_csv(path)
    assert rows[-1]["figure"] == "seconds" and rows[-1]["after"] == ""  # it was resumed
    assert tables.first(rows) == f"```\n{compare_table(measured).rstrip()}\n```"


def test_a_readme_without_a_place_for_a_table_is_refused_and_left_alone(tmp_path, capsys):
    with pytest.raises(DataError, match="no place for the table '1-shortcut 1'"):
        results.fill("text", {"1-shortcut 1": "| a |"})


def test_what_cannot_be_used_ends_with_a_line_and_code_2(tmp_path, capsys):
    assert results.main(["--results", str(tmp_path)]) == 2
    assert results.main(["--compare", str(tmp_path)]) == 2
    assert experiments.main(["runs", "--workers", "0"]) == 2
    assert experiments.main(["runs", "--seeds", "0"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and "runs.csv" in told[0]
    assert "--workers" in told[2] and "--seeds" in told[3]


def test_a_quick_run_is_shown_beside_the_committed_rows(tmp_path):
    for name, value in (("quick", 0.2), ("results", 0.1)):
        folder = tmp_path / name
        row = {"arm": "copo", "seed": 0, "step": 40, "setting": "independent", "chair_s": value}
        write_csv(folder / "runs.csv", [row], COLUMNS)
    text = results.compare(tmp_path / "quick", tmp_path / "results")
    assert "CHAIR_S" in text and "0.2" in text and "0.1" in text


def test_committed_rows_name_their_command_and_the_commit_they_come_from():
    folder = HERE / "results"
    assert set(results.NEEDED) <= {path.stem for path in folder.glob("*.csv")}
    for path in folder.glob("*.csv"):
        rows = read_csv(path)
        if path.stem == "paper":
            assert rows and all(row["source"] for row in rows)
            continue
        assert rows and all(row["command"] and row["commit"] for row in rows), path
        assert not any(row["commit"].endswith("+") for row in rows), path


HERE = experiments.Path(experiments.__file__).parent


def test_the_readme_s_tables_are_those_of_the_committed_csvs():
    found = results.all_tables(HERE / "results")
    for name, claim in results.claims(HERE / "results").items():
        for i, table in enumerate(claim.tables, 1):
            found[f"{name} {i}"] = results.sourced(table, claim.csv)
    assert "nan" not in "".join(found.values())
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert results.fill(readme, found) == readme


def test_every_decimal_in_the_prose_about_a_claim_is_near_one_of_its_tables():
    """Rounded to the digits of the prose; a mean with its interval is one cell; settings are in backticks.

    A number that is near none is stale; one that is near another cell passes.
    """
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Does it work?") : readme.index("## What it costs")]
    table = re.compile(r"<!-- results .*?<!-- end -->", re.DOTALL)

    def cells(text):
        """Numbers with decimals, signed where they say so, each with its interval where it has one."""
        text = text.replace("−", "-")
        return re.findall(r"(?<![\w.])([+-]?\d+\.\d+)(?:\s±\s(\d+\.\d+))?(?![\w.])", text)

    def near(said, known):
        known = known if said[0][0] in "+-" else (known[0].lstrip("+-"), known[1])
        return all(
            not s or (k and abs(float(s) - float(k)) <= 0.5 * 10 ** -len(s.split(".")[1]) + 1e-9)
            for s, k in zip(said, known, strict=True)
        )

    for part in re.split(r"^### ", section, flags=re.MULTILINE):
        tables_of = section if part.startswith("## ") else part
        known = [cell for found in table.findall(tables_of) for cell in cells(found)]
        for said in cells(re.sub(r"`[^`]*`", "", table.sub("", part))):
            assert any(near(said, cell) for cell in known), (part[:40], said)
