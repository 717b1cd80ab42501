"""baselines.csv: each system once per seed, from one warm start; its table, by hand."""

import pytest

from baselines.making import Method
from baselines.settings import DeCo
from data import DataError
from experiments import baselines, systems
from experiments.baselines import COLUMNS, SYSTEMS, Decoder, Learner
from experiments.records import read_csv, write_csv


@pytest.fixture
def pretend(monkeypatch, speaker):
    """Rows without a model; the (system, seed) that were run."""
    ran = []

    def run_one(name, world, seed, start, work):
        ran.append((name, seed) if world == "fog" else (name, world, seed))
        return {
            "system": name,
            "world": world,
            "seed": seed,
            "scenes": 150,
            "start": "a",
            "chair_s": 0.1,
            "command": "x",
        }

    monkeypatch.setattr(baselines, "warm_start", lambda work, settings: speaker)
    monkeypatch.setattr(baselines, "hash_of", lambda start: "a")
    monkeypatch.setattr(baselines, "run_one", run_one)
    return ran


def test_rows_that_are_there_are_not_run_again_and_seeds_come_in_turn(pretend, tmp_path):
    flags = [
        "--systems",
        "deco",
        "hadpo",
        "--output",
        str(tmp_path / "b.csv"),
        "--work",
        str(tmp_path),
    ]
    fog = [*flags, "--worlds", "fog"]
    assert baselines.main([*fog, "--seeds", "2"]) == 0
    assert pretend == [("deco", 0), ("hadpo", 0), ("hadpo", 1)]  # nothing of DeCo is drawn
    assert baselines.main(fog) == 0
    assert pretend[3:] == [("hadpo", 2), ("hadpo", 3), ("hadpo", 4)]
    rows = read_csv(tmp_path / "b.csv")
    assert len(rows) == 6 and all(row["commit"] and row["command"] for row in rows)
    del pretend[:]
    assert baselines.main([*flags, "--seeds", "2"]) == 0  # in crowds each seed has its own start
    assert pretend == [(name, "crowds", seed) for seed in (0, 1) for name in ("deco", "hadpo")]


def test_in_crowds_a_seed_begins_at_its_own_warm_start_and_one_in_fog_at_the_common_one():
    fog, crowds = baselines.WORLDS.values()
    assert fog.start_of(3) == fog.start_of(0) and crowds.start_of(3).seed == 3
    assert baselines.seeds_of("opera", crowds) == 1 and baselines.seeds_of("beam", fog) == 1


def test_what_is_trained_in_crowds_takes_as_many_steps_and_prompts_as_grpo_there(
    monkeypatch, tmp_path
):
    asked = []

    def learn(settings, method, start):
        asked.append((settings.steps, settings.batch_size, method.num_pairs, settings.crowds))
        settings.output.mkdir(parents=True)
        (settings.output / "pairs.jsonl").write_text('{"prompts": 9, "pairs": []}\n')

    monkeypatch.setattr(baselines, "learn", learn)
    monkeypatch.setattr(baselines, "load_policy", lambda start: None)
    for world, where in baselines.WORLDS.items():
        baselines.train(SYSTEMS["povid"], where, 0, tmp_path, tmp_path / world)
    assert asked == [
        (30, 16, 480, False),
        (10, 16, 160, False),
        (60, 4, 240, True),
        (20, 4, 80, True),
    ]


def test_a_csv_of_another_warm_start_is_left_alone(pretend, tmp_path, capsys):
    write_csv(
        tmp_path / "b.csv", [{"system": "deco", "world": "fog", "seed": 0, "start": "b"}], COLUMNS
    )
    assert baselines.main(["--output", str(tmp_path / "b.csv"), "--work", str(tmp_path)]) == 2
    assert "of another warm start" in capsys.readouterr().err and not pretend
    assert baselines.main(["--seeds", "0"]) == 2
    assert "--seeds must be at least 1" in capsys.readouterr().err


def test_a_quick_run_has_a_row_of_each_family_and_is_shown_beside_what_is_committed(
    pretend, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_csv(
        baselines.RESULTS, [{"system": "hadpo", "world": "fog", "seed": 0, "chair_s": 0.3}], COLUMNS
    )
    assert baselines.main(["--quick"]) == 0
    assert pretend == [("beam", 0), ("deco", 0), ("hadpo", 0)]
    said = capsys.readouterr().out
    assert "hadpo, in fog, seed 0" in said and "0.3" in said and "0.1" in said


def test_a_decoded_and_a_trained_system_end_as_rows(speaker, tmp_path, monkeypatch):
    small = {"prompts_at_once": 16}
    rounds = ((Method("povid", **small), 1), (Method("povid", stage=2, **small), 1))
    monkeypatch.setitem(SYSTEMS, "deco", Decoder(DeCo(), scenes=2))
    monkeypatch.setitem(SYSTEMS, "povid", Learner(rounds, scenes=2))
    for name in ("deco", "povid"):
        row = baselines.run_one(name, "fog", 0, speaker, tmp_path)
        again = baselines.run_one(
            name, "fog", 0, speaker, tmp_path
        )  # nothing is made or trained anew
        assert {**again, "seconds": 0} == {**row, "seconds": 0}
        assert set(row) <= set(COLUMNS) and row["scenes"] == 2 and row["forwards"] in (1, "1")
    assert (row["pairs"], row["prompts"]) == (32, 32) and row["seconds"] > 0


def test_every_system_has_a_place_in_the_table():
    named = {name for name, _ in systems.DECODED} | set(systems.TRAINED)
    assert set(SYSTEMS) <= named and set(systems.NAMES) < named
    assert set(baselines.QUICK) <= set(SYSTEMS) and set(baselines.WORLDS) == set(systems.WORLDS)
    assert all(where.main in systems.TRAINED for where in systems.WORLDS.values())


def test_the_table_worked_by_hand(tmp_path):
    figures = dict.fromkeys(systems.FIGURES, "0.5")
    rows = [
        {"system": "hadpo", "world": "fog", "seed": seed, "scenes": 150, "start": "a", "seconds": 10,
         **figures, "chair_s": chair_s}
        for seed, chair_s in enumerate((0.2, 0.3))
    ] + [{"system": "opera", "world": "fog", "seed": 0, "scenes": 20, "start": "a", **figures}]  # fmt: skip
    write_csv(tmp_path / "baselines.csv", rows, COLUMNS)
    runs = [
        {"arm": arm, "seed": seed, "step": step, "setting": "independent", "start": start,
         "seconds": 30, **figures, "chair_s": chair_s}
        for arm, seed, step, start, chair_s in (
            ("warm start", "", 0, "a", 0.4), ("copo", 0, 40, "a", 0.1), ("copo", 1, 40, "a", 0.2),
            ("copo", 2, 40, "b", 0.9), ("copo", 0, 20, "a", 0.9), ("grpo", 0, 40, "b", 0.9),
        )
    ]  # fmt: skip
    write_csv(tmp_path / "runs.csv", runs, tuple(runs[0]))
    found = [line[2:-2].split(" | ") for line in systems.table(tmp_path, "fog").splitlines()[2:]]
    assert [(line[0], *line[1:4]) for line in found] == [
        ("greedy", "150", "1", "0.400"),
        ("OPERA", "20", "1", "0.500"),
        ("COPO", "150", "2", "0.150 ± 0.635"),  # 12.706 * 0.0707 / sqrt(2)
        ("HA-DPO, stand-in", "150", "2", "0.250 ± 0.635"),
    ]
    assert found[1][-3:] == ["30", "-", ""]
    assert found[3][-3:] == ["1", "10 ± 0", "+0.100 ± 0.000 (p < 0.01)"]


def test_a_run_that_fails_leaves_no_row(tmp_path, speaker, monkeypatch):
    monkeypatch.setattr(baselines, "warm_start", lambda work, settings: speaker)

    def broken(*_):
        raise DataError("the reason")

    monkeypatch.setattr(baselines, "run_one", broken)
    assert baselines.main(["--output", str(tmp_path / "b.csv"), "--work", str(tmp_path)]) == 2
    assert not (tmp_path / "b.csv").exists()
