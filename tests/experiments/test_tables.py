"""From rows to tables: files, statistics by hand, which rows are compared with which."""

import math

import pytest

from experiments import tables
from experiments.claims import ARMS, BEFORE, COLUMNS
from experiments.records import read_csv, write_csv
from experiments.statistics import Difference, difference, holm, interval, paired


def test_rows_survive_the_file_with_commas_in_their_names(tmp_path):
    rows = [{"arm": "grpo, in words", "seed": 1, "step": 40, "chair_s": 0.123456789}]
    write_csv(tmp_path / "runs.csv", rows, COLUMNS)
    (row,) = read_csv(tmp_path / "runs.csv")
    assert (row["arm"], row["seed"], row["chair_s"], row["flip_rate"]) == (
        "grpo, in words", "1", "0.12346", "",
    )  # fmt: skip
    assert read_csv(tmp_path / "none.csv") == []


# -- statistics ---------------------------------------------------------------------------------
def test_student_s_interval_and_paired_test_by_hand():
    # 1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), t(4) = 2.776 -> 2.776 * sqrt(2.5 / 5) = 1.963
    mean, half = interval([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(1.963, abs=1e-3)
    # differences 1, 2, 3, 4, 5 over 0: t = 3 / sqrt(0.5) = 4.243, p = 0.0132
    a, b = {str(i): i + 1.0 for i in range(5)}, {str(i): 0.0 for i in range(5)}
    assert paired(a, b)[2:] == (pytest.approx(0.0132, abs=1e-4), 5)
    assert str(difference(a, b)) == "+3.000 ± 1.963 (p = 0.01)"
    assert paired(a, a)[2] == 1  # no difference at all
    assert math.isnan(interval([])[0]) and math.isnan(interval([1.0])[1])


def test_only_seeds_that_both_have_are_paired():
    assert paired({"0": 1.0, "1": 3.0, "7": 9.0}, {"1": 1.0, "0": 1.0})[0] == 1.0
    assert difference({"0": 1.0}, {"0": 0.5, "1": 0.5}).n == 1
    assert str(difference({"0": 1.0}, {"0": 0.5, "1": 0.5})) == "-"


def test_all_tests_of_a_table_are_corrected_together_by_holm_s_method():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []
    one, two = Difference(0.1, 0.05, 0.02, 5), Difference(-0.1, 0.05, 0.03, 5)
    none = Difference(0.1, math.nan, math.nan, 1)
    table = tables.markdown(["", "a", "b"], [["x", one, none], ["y", "1.0", two]])
    assert table.splitlines()[2:] == [
        "| x | +0.100 ± 0.050 (p = 0.04) | - |", "| y | 1.0 | -0.100 ± 0.050 (p = 0.04) |",
    ]  # fmt: skip
    assert one.p == 0.02


# -- which rows a table reads ---------------------------------------------------------------------
def test_every_arm_has_a_place_in_a_table_or_a_plot():
    shown = {row.arm for row in tables.REMEDIES}
    shown |= {arm for arms in tables.COLOURS.values() for arm in arms.values()}
    for beta, methods in (("0", tables.COUNTED | tables.CREDITS), ("0.04", tables.COUNTED)):
        shown |= {tables.counted(method, beta) for method in methods}
    shown |= {f"{method}, counting, B {B}" for method in tables.FEW for B in (1, 2)}
    shown |= {arm for group in tables.SENSITIVITY.values() for arm in group}
    shown |= {arm for of_method in tables.CONFOUNDED.values() for arm in of_method.values()}
    assert set(ARMS) - shown == {"grpo, in words", "grpo, no existence"}  # claim 1
    assert shown <= set(ARMS | BEFORE)
    steps = [(row.arm, row.step) for row in tables.REMEDIES if row.step is not None]
    assert all(step in (ARMS | BEFORE)[arm].steps for arm, step in steps)


def test_equal_time_is_the_first_checkpoint_that_took_as_long_as_40_steps_of_copo(tmp_path):
    rows = [
        {"arm": arm, "seed": seed, "step": step, "setting": "independent", "seconds": time,
         "chair_s": step}
        for arm, seed, step, time in (
            ("copo", 0, 40, 100), ("copo", 0, 80, 200), ("copo", 1, 40, 70),
            ("grpo", 0, 40, 60), ("grpo", 0, 80, 90), ("grpo", 0, 100, 120),
            ("grpo", 1, 40, 60), ("grpo", 1, 80, 81), ("grpo", 1, 100, 110),
        )
    ]  # fmt: skip
    write_csv(tmp_path / "runs.csv", rows, COLUMNS)
    runs = tables.Runs(tmp_path)
    # together the seeds take 171 s to step 80, COPO 170 s to its step 40
    assert runs.values("grpo", None, "independent", "chair_s") == {"0": 80, "1": 80}
    write_csv(tmp_path / "runs.csv", rows[:-2], COLUMNS)
    assert tables.Runs(tmp_path).equal_time("grpo") is None  # a seed has none that took so long


def test_the_slope_on_confounding_is_that_of_each_seed_s_own_line(tmp_path):
    lines = {
        "0": lambda rho: 0.1 + 0.2 * rho,
        "1": lambda rho: 0.3 - 0.1 * rho,
        "2": lambda rho: 0.0,
    }
    rows = [
        {"arm": arm, "seed": seed, "step": 40, "setting": "independent", "chair_s": line(float(rho))}
        for seed, line in lines.items()
        for rho, arm in tables.CONFOUNDED["grpo"].items()
        if (seed, rho) != ("2", "0.5")  # a seed that lacks a run has no line
    ]  # fmt: skip
    write_csv(tmp_path / "runs.csv", rows, COLUMNS)
    slopes = tables.slopes_on_rho(tables.Runs(tmp_path), "grpo", "chair_s")
    assert slopes == {"0": pytest.approx(0.2, abs=1e-3), "1": pytest.approx(-0.1, abs=1e-3)}


@pytest.fixture
def few_runs(tmp_path):
    """Two seeds of some arms; CHAIR_S as said, plus a tenth for seed 1."""
    rows = [
        {"arm": arm, "seed": seed, "step": step, "setting": "independent", "chair_s": value + seed / 10,
         "counts_chair_s": value + seed / 10, "counts": 1 - value, "token_forwards": 1_500_000}
        for arm, step, value in (
            ("grpo, colours", 20, 0.1), ("grpo, colours", 80, 0.5), ("grpo, colours, beta 0", 80, 0.2),
            ("truth, colours, beta 0", 80, 0.1), ("warm start, crowded", 0, 0.1),
            ("grpo, counting, beta 0", 80, 0.5), ("truth, counting, beta 0", 80, 0.1),
            ("agreement, counting, beta 0", 80, 0.2), ("copo, counting, beta 0", 40, 0.6),
        )
        for seed in range(2)
    ]  # fmt: skip
    write_csv(tmp_path / "runs.csv", rows, COLUMNS)
    return tables.Runs(tmp_path)


def cells_of(table, name):
    lines = table.splitlines()
    (line,) = (line for line in lines if line.startswith(f"| {name} |"))
    return dict(zip(lines[0][2:-2].split(" | "), line[2:-2].split(" | "), strict=True))


def test_a_line_is_compared_with_the_arm_and_the_step_it_names(few_runs):
    table = tables.colours(few_runs)
    assert cells_of(table, "β = 0, the truth as credit")["CHAIR_S, less GRPO"].startswith("-0.100")
    assert cells_of(table, "β = 0.04, GRPO")["CHAIR_S, less GRPO"] == ""
    assert cells_of(table, "β = 0.04, GRPO")["CHAIR_S"] == "0.550 ± 0.635"
    assert cells_of(table, "β = 0, GRPO, less β = 0.04")["CHAIR_S, less GRPO"].startswith("-0.300")
    own = cells_of(table, "β = 0.04, GRPO, less its own 20 steps")
    assert own["CHAIR_S, less GRPO"].startswith("+0.400")
    assert "β = 0, COPO" not in table  # not run yet


def test_counting_is_compared_with_grpo_and_with_each_seed_s_own_warm_start(few_runs):
    head = "CHAIR_S of the reasoning, less GRPO"
    table = tables.counting(few_runs)
    assert cells_of(table, "β = 0, the truth as credit")[head].startswith("-0.400")
    assert cells_of(table, "β = 0, COPO, 40 steps")[head].startswith("+0.100")  # less GRPO's 80
    assert cells_of(table, "β = 0, GRPO")["million token positions"] == "1.50 ± 0.00"
    bred = cells_of(tables.bred(few_runs), "β = 0, 80 steps")
    assert bred["CHAIR_S of the reasoning, less warm start"].startswith("+0.400")
    assert bred["counts right, less warm start"].startswith("-0.400")


def test_the_planned_comparisons_are_of_arms_that_exist_and_corrected_together(few_runs):
    for _, _, figure, arm, step, other, at in tables.PLANNED:
        assert step in (ARMS | BEFORE)[arm].steps and at in (ARMS | BEFORE)[other].steps
        assert figure in COLUMNS
    lines = tables.planned(few_runs).splitlines()
    assert lines[2].endswith("| 2 | -0.300 ± 0.000 (p < 0.01) |")
    assert lines[4].endswith("| 0 | - |")  # COPO has no run after 80 steps


def test_the_gap_closed_is_the_share_of_the_way_from_grpo_to_the_truth(few_runs):
    table = tables.credits(few_runs)
    assert cells_of(table, "agreement within the group")["gap closed"] == "0.75"  # 0.3 of 0.4
    assert cells_of(table, "the truth as credit")["gap closed"] == "1.00"
    assert "COPO" not in table  # no run after 80 steps


def test_what_was_made_again_is_set_beside_what_was_made_once_and_beside_grpo(tmp_path):
    def rows(arm, values, tokens):
        return [
            {"arm": f"{arm}, counting, beta 0", "seed": seed, "step": 80, "setting": "independent",
             "chair_s": 0, "counts_chair_s": value, "counts": 0.5, "token_forwards": tokens}
            for seed, value in enumerate(values)
        ]  # fmt: skip

    once = rows("copo", (0.5, 0.7, 0.9), 2e6) + rows("grpo", (0.4, 0.4, 0.4), 1e6)
    write_csv(tmp_path / "runs.csv", once, COLUMNS)
    write_csv(tmp_path / "repeated.csv", rows("copo", (0.4, 0.5), 1.5e6), COLUMNS)
    table = tables.repeated(tables.Runs(tmp_path), tables.Runs(tmp_path, "repeated"))
    of_4 = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    # differences 0.1 0.3 0.5 | 0.0 0.1 | means of both 0.45 0.60, so 0.05 0.20
    assert of_4[:4] == ["B = 4", "2", "2.00 ± 0.00", "1.50 ± 0.00"]
    assert of_4[4].startswith("+0.300 ±") and "p" not in of_4[4]
    assert of_4[5].startswith("+0.050 ±") and "(p = 0.50)" in of_4[5]  # t(1) = 1
    assert of_4[6].startswith("+0.125 ±") and of_4[7].startswith("+0.000")


def test_costs_are_found_by_their_words_whatever_the_program_was_called(tmp_path):
    rows = [
        {"command": "benchmark.py step --model M", "figure": "seconds", "way": "COPO", "value": 1.5},
        {"command": "experiments/cost.py step", "figure": "seconds", "way": "COPO", "value": 2.5},
    ]  # fmt: skip
    write_csv(tmp_path / "cost.csv", rows, tuple(rows[0]))
    costs = tables.Costs(tmp_path / "cost.csv")
    assert costs.value("step --model M", "seconds", "COPO") == 1.5
    assert costs.value("step", "seconds", "COPO") == 2.5
    assert math.isnan(costs.value("step", "seconds", "GRPO"))


# -- single tables --------------------------------------------------------------------------------
def first_rows():
    """What `python -m experiments.claims first` writes, its columns told apart by their first digit."""
    headings = (
        "accuracy", "POPE F1, random", "POPE F1, adversarial", "CHAIR_S  (lower is better)",
        "caption recall", "flip rate under do(L_s)  (lower is better)",
    )  # fmt: skip
    columns = ("warm_start", "grpo", "copo")
    rows = [
        {"scenes": f"{kind} scenes (n = 3)", "figure": heading,
         **{column: f"0.{k}{i}{kind == 'independent':d}" for k, column in enumerate(columns, 1)}}
        for kind in ("confounded", "independent")
        for i, heading in enumerate(headings)
    ]  # fmt: skip
    rows.append({"scenes": "", "figure": "seconds", "warm_start": "", "grpo": "90", "copo": "300"})
    return rows


def test_the_first_table_holds_the_independent_scenes_and_the_minutes():
    two = [row | {"seed": seed} for seed in ("0", "1") for row in first_rows()]
    assert tables.first(two).splitlines()[0].startswith("| independent scenes (n = 3; seeds: 2) |")
    for row in two:
        row["copo"] = row["copo"] and float(row["copo"]) + 0.002 * (row["seed"] == "1")
    assert "| accuracy | 0.101 | 0.201 | 0.302 |" in tables.first(two)
    assert (
        tables.first_seeds(two).splitlines()[2].startswith("| 0 | 0.101 | 0.201 | 0.301 | 0.131 |")
    )
    assert tables.first([row | {"seed": "0"} for row in first_rows()]).splitlines() == [
        "| independent scenes (n = 3; seeds: 1) | warm start | GRPO | COPO |",
        "| --- | --- | --- | --- |",
        "| accuracy | 0.101 | 0.201 | 0.301 |",
        "| POPE F1, adversarial | 0.121 | 0.221 | 0.321 |",
        "| CHAIR_S (lower is better) | 0.131 | 0.231 | 0.331 |",
        "| caption recall | 0.141 | 0.241 | 0.341 |",
        "| flip rate (lower is better) | 0.151 | 0.251 | 0.351 |",
        "| minutes, seed 0 (COPO: with the warm start) |  | 1.5 | 5.0 |",
    ]


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
    assert told.startswith("2 trainings; 1.5 hours of training in all, each on one core; 900 sec")
    assert "each of 3 checkpoints (timed for 2): 1.1 hours on two cores" in told  # (1.5 + 0.75) / 2
