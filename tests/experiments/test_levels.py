"""Steps to a level: when a run is there, and what it ran until then."""

import csv

from experiments import levels, tables
from experiments.arms import ARMS


def a_run(folder, rewards):
    """A run of two prompts, eight completions of ten tokens each, scored by 100 token positions per step."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["reward", "completion_length", "scoring_token_forwards"])
        writer.writerows([reward, 10, 100] for reward in rewards)


def test_a_run_is_there_when_its_last_twenty_steps_earned_the_level():
    assert levels.reached([0.0] * 10 + [1.0] * 30, 0.7) == 24  # 14 of steps 5 to 24 earned 1
    assert levels.reached([1.0] * 19, 0.7) is None  # too few
    assert levels.reached([0.6] * 80, 0.7) is None


def test_positions_are_those_of_all_steps_until_then(tmp_path):
    a_run(tmp_path / f"copo-counting-b-2-3-{'a1' * 6}", [0.0] * 10 + [1.0] * 14 + [0.0] * 56)
    first, second = levels.rows_of(tmp_path, "copo, counting, B 2", 3)
    assert (first["level"], first["step"]) == (0.7, 24)
    # 2 prompts x 8 completions x 10 tokens, drawn and updated without a KL, and 100 that were scored
    assert first["token_forwards"] == 24 * (2 * 160 + 100)
    assert (second["level"], second["step"], second["token_forwards"]) == (0.8, "", "")


def test_another_seed_or_weight_of_the_kl_is_another_run(tmp_path):
    a_run(tmp_path / f"grpo-counting-beta-0.04-0-{'0' * 12}", [1.0] * 80)
    a_run(tmp_path / f"grpo-counting-beta-0-10-{'0' * 12}", [1.0] * 80)
    assert "grpo, counting, beta 0" in ARMS
    assert levels.main(["--work", str(tmp_path), "--output", str(tmp_path / "levels.csv")]) == 2


def test_a_missing_run_is_told_in_a_line_and_nothing_is_written(tmp_path, capsys):
    output = tmp_path / "levels.csv"
    assert levels.main(["--work", str(tmp_path), "--output", str(output)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and 'claims runs --arms "grpo, counting, B 1"' in told
    assert not output.exists()


def test_the_table_gives_medians_over_seeds_where_most_get_there():
    rows = [
        {"arm": f"{name}, counting, B 2", "level": "0.7", "step": step, "token_forwards": positions}
        for name, runs in {
            "grpo": (("10", "1000"), ("30", "3000"), ("", "")),
            "copo": (("20", "9000"), ("", ""), ("", "")),
        }.items()
        for step, positions in runs
    ]
    told = tables.levels(rows).splitlines()[2:]
    assert told == ["| B = 2, GRPO | 2 of 3 | 30 | 3 |", "| B = 2, COPO | 1 of 3 |  |  |"]
