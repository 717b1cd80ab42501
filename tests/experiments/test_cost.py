"""The benchmarks run, and refuse to time ways that disagree."""

import json

import pytest
import torch

from experiments import cost
from experiments.records import read_csv
from interventions import Interventions
from runs import Settings

SMALL = ["--shape", "tiny", "--prompt-tokens", "24", "--reasoning-tokens", "4", "--answer-tokens", "3",
         "--num-generations", "2", "--repeats", "1", "--naive-places", "2"]  # fmt: skip
SMALL_STEP = {"batch_size": 2, "num_generations": 2, "max_completion_length": 16}


def test_interventions_are_compared_and_counted(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert cost.main(["interventions", *SMALL, "--json", str(path)]) == 0
    ways = json.loads(path.read_text())["ways"]
    T, A, H, G = 4, 3, 4, 2
    for name in ("(c) copied cache", "(d) shared, independent"):
        assert ways[name]["rows"] == G * H * (T + 1)
        assert ways[name]["row_forwards"] == G * H * (T + 1) * (T / 2 + A - 1)
    assert ways["(e) shared, coupled"]["rows"] <= ways["(d) shared, independent"]["rows"]
    assert (
        ways["(c) copied cache"]["kv_megabytes"] > ways["(d) shared, independent"]["kv_megabytes"]
    )
    for way in ("(d) shared, independent", "(e) shared, coupled", "necessity: shared"):
        assert 0 < ways[way]["least_forwards"] <= ways[way]["row_forwards"]
    assert "necessity: shared" in capsys.readouterr().out


def test_the_least_is_each_distinct_beginning_once(rollouts):
    noted = cost.NotedCompletions(rollouts)
    assert noted.least() == 0  # the trajectories are known
    n, own = 0, rollouts.completion_ids[0]
    for ending in ([1, 2, 3], [1, 2, 4], [1, 5]):  # a tree after three tokens of the trajectory
        tokens = torch.cat([own[:3], torch.tensor(ending) + int(own[3]) + 1])
        assert noted.rollouts.reward([n], [tokens]) == rollouts.reward([n], [tokens])
    assert noted.least() == 2  # [1] and [1, 2]; the last token of a completion is not run


def test_the_update_has_the_gradients_of_the_plain_one(tmp_path):
    path = tmp_path / "figures.json"
    flags = [*SMALL, "--prompt-tokens", "120", "--json", str(path)]
    assert cost.main(["update", *flags, f"--csv={tmp_path / 'cost.csv'}"]) == 0
    (command,) = {row["command"] for row in read_csv(tmp_path / "cost.csv")}
    assert command == (
        "experiments/cost.py update --shape tiny --prompt-tokens 120 --reasoning-tokens 4 "
        "--answer-tokens 3 --num-generations 2 --repeats 1 --naive-places 2"
    )
    assert json.loads(path.read_text())["largest_relative_difference_of_gradients"] < 1e-4


def test_ways_that_disagree_are_not_timed(monkeypatch):
    original = cost.CopiedCache.masked_rewards
    monkeypatch.setattr(cost.CopiedCache, "masked_rewards", lambda self: original(self) + 1)
    with pytest.raises(AssertionError, match="different masked answers"):
        cost.main(["interventions", *SMALL])
    assert Interventions.masked_rewards is original


def test_figures_are_kept_by_command_the_latest_in_the_place_of_the_last(tmp_path):
    path = tmp_path / "cost.csv"
    for value in (1.5, 2.5):
        result = {"ways": {"(a)": {"seconds": value}}, "sets": 3}
        cost.keep_rows(path, "experiments/cost.py interventions", result)
    cost.keep_rows(path, "experiments/cost.py step", {"COPO": {"step_seconds": 1.0}, "steps": 5})
    growth = {"reasoning_tokens": {"(d)": {16: {"seconds": 0.5}, 32: {"seconds": 1.0}}}}
    cost.keep_rows(path, "experiments/cost.py growth", {"growth": growth, "mean_probability": 0.8})
    rows = [(r["command"], r["way"], r["figure"], r["value"]) for r in read_csv(path)]
    assert rows == [
        ("experiments/cost.py interventions", "", "sets", "3"),
        ("experiments/cost.py interventions", "(a)", "seconds", "2.5"),
        ("experiments/cost.py step", "", "steps", "5"),
        ("experiments/cost.py step", "COPO", "step_seconds", "1"),
        ("experiments/cost.py growth", "", "mean_probability", "0.8"),
        ("experiments/cost.py growth", "(d)", "seconds, reasoning_tokens 16", "0.5"),
        ("experiments/cost.py growth", "(d)", "seconds, reasoning_tokens 32", "1"),
    ]


def test_rows_under_the_program_s_old_name_are_replaced_too(tmp_path):
    path = tmp_path / "cost.csv"
    for command in ("benchmark.py step", "benchmark.py step --seed 1", "experiments/cost.py step"):
        cost.keep_rows(path, command, {"steps": 5})
    commands = [row["command"] for row in read_csv(path)]
    assert commands == ["benchmark.py step --seed 1", "experiments/cost.py step"]


def test_the_update_needs_a_shape(capsys):
    assert cost.main(["update"]) == 2
    assert "--shape" in capsys.readouterr().err


def test_a_flag_has_the_default_of_its_field():
    args = vars(cost.parser_of_flags().parse_args(["step"]))
    assert cost.Workload(**{name: args[name] for name in vars(cost.Workload())}) == cost.Workload()


def test_copo_s_step_stands_beside_grpo_s(speaker, monkeypatch):
    monkeypatch.setattr(cost, "Settings", lambda **facts: Settings(**facts, **SMALL_STEP))
    result = cost.benchmark_step(cost.Workload(model=str(speaker), repeats=1))
    assert result["steps"] == 5 and result["copo_over_grpo"] > 0
    assert result["GRPO"]["score_seconds"] < result["COPO"]["score_seconds"]


def test_scoring_is_measured_as_it_grows_in_each_way():
    points = cost.measure_growth(
        cost.Workload(
            shape="tiny", prompt_tokens=24, reasoning_tokens=4, answer_tokens=3, num_generations=2
        )
    )
    assert points["(a) generate, by its formula"]["token_forwards"] == 2 * 4 * 5 * (24 + 4 + 3 - 1)
    assert points["(e) shared, coupled"]["token_forwards"] > 0
    assert len(points) == 4
