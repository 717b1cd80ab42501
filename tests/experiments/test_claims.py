"""The runs behind the claims: arms, one run and its rows, all runs and the CSV that holds them."""

import itertools
import json
import pickle
import random
from concurrent.futures import Future
from dataclasses import replace

import pytest

import runs
import scm
from experiments import claims, jobs, tokens
from experiments.arms import ARMS, BEFORE, GRPO, IN_CLEAR_AIR, IN_WORDS, QUICK, Arm
from experiments.claims import COLUMNS, FIGURES
from experiments.credits import Paid, truth
from experiments.records import read_csv
from experiments.variants import SecondBest, difference, score_as
from hallucination.scenes import compare_rows
from tiny import WarmStart

SMALL = {"batch_size": 2, "num_generations": 3, "max_completion_length": 24}


# -- arms ---------------------------------------------------------------------------------------
def test_every_arm_has_settings_that_train_takes_and_reaches_a_worker(tmp_path):
    for name, arm in ARMS.items():
        settings = arm.settings(3, tmp_path / name)
        runs.check(settings)
        assert (settings.seed, settings.steps, settings.fog) == (
            3,
            arm.steps[-1],
            arm.start.world.fog,
        )
        assert settings.confounding == arm.confounding
        assert all(step % settings.save_steps == 0 for step in arm.steps)
        assert set(arm.kinds) <= set(scm.KINDS)
        again = pickle.loads(pickle.dumps(arm))
        assert (again.changes, again.steps, again.kinds) == (arm.changes, arm.steps, arm.kinds)


def test_every_arm_begins_at_a_warm_start_that_is_measured():
    for arm in ARMS.values():
        assert sum(arm.start == before.start for before in BEFORE.values()) == 1
        assert arm.own_start == BEFORE[claims.start_of(arm)].own_start
    assert all(step in ARMS[name].steps for name, step in QUICK.items())


def test_only_where_each_seed_has_its_own_start_does_the_warm_start_depend_on_the_seed():
    for arm in ARMS.values():
        assert (arm.start_of(3) != arm.start_of(4)) == arm.own_start


def test_questions_are_drawn_until_one_is_of_the_kinds_asked_for():
    start = WarmStart(scm.World(0.3))
    arm = Arm({"confounding": 0.5}, start=start, kinds=("choice", "number"))
    rng = random.Random(7)
    some = [arm.sample(rng) for _ in range(20)]
    rng = random.Random(7)
    endless = (scm.sample_example(rng, 0.5, scm.World(0.3)) for _ in itertools.count())
    expected = itertools.islice((e for e in endless if e.kind in arm.kinds), 20)
    assert [(e.scene, e.question) for e in some] == [(e.scene, e.question) for e in expected]
    described = replace(arm, start=replace(start, in_words=True)).sample(random.Random(7))
    assert described.image is None and described.question == scm.in_words(some[0]).question


# -- one run ------------------------------------------------------------------------------------
@pytest.fixture
def tiny(monkeypatch, speaker):
    """Experiments on a starting point that is there already, with runs that take seconds."""
    arms = {
        "grpo": Arm(GRPO | SMALL, (1, 2), IN_CLEAR_AIR),
        "copo": Arm(SMALL, (1, 2), IN_CLEAR_AIR),
    }
    monkeypatch.setattr(claims, "ARMS", arms)
    monkeypatch.setattr(claims, "BEFORE", {"warm start": Arm(steps=(0,), start=IN_CLEAR_AIR)})
    monkeypatch.setattr(claims, "saliency_sheet", lambda *_, **__: {"background_share": 0.5})
    monkeypatch.setattr(claims, "words_sheet", lambda *_: {"idle_words_share": 0.5})
    asked_in = []
    monkeypatch.setattr(claims, "warm_start", lambda cache, _: asked_in.append(cache) or speaker)
    monkeypatch.setattr(claims, "asked_in", asked_in, raising=False)
    return arms


def test_a_run_gives_a_row_for_each_checkpoint_and_setting_of_scenes(tiny, tmp_path):
    rows = claims.run_arm("copo", tiny["copo"], 0, tmp_path, scenes=1)
    assert [(r["step"], r["setting"]) for r in rows] == [
        (1, "confounded"), (1, "independent"), (2, "confounded"), (2, "independent"),
    ]  # fmt: skip
    assert all(row[name] >= 0 for row in rows for name in FIGURES)
    assert all(set(row) < set(COLUMNS) for row in rows)
    assert rows[0]["seconds"] < rows[-1]["seconds"]
    assert rows[0]["command"] == 'python -m experiments.claims runs --arms "copo" --seeds 1'
    again = claims.run_arm("copo", tiny["copo"], 0, tmp_path, scenes=1)
    assert all(row.pop("measuring_seconds") > 0 for row in (*rows, *again))
    assert again == rows  # nothing is trained again
    assert set(claims.asked_in) == {tmp_path}
    before = claims.run_arm("warm start", claims.BEFORE["warm start"], "", tmp_path, 1)
    assert [row["step"] for row in before] == [0, 0]


@pytest.mark.parametrize("scoring", [score_as(difference, SecondBest), Paid(truth)])
def test_an_arm_has_questions_and_causal_rewards_of_its_own(tiny, tmp_path, scoring):
    # enough completions that some of this speaker's have closed reasoning
    changes = {"batch_size": 8, "num_generations": 4, "lambda_s": 1.0}
    arm = Arm(changes, (1,), IN_WORDS, kinds=("choice",), scoring=scoring)
    rows = claims.run_arm("own", arm, 4, tmp_path, scenes=1)
    assert rows[0]["step"] == 1 and "idle_words_share" in rows[0]
    (folder,) = tmp_path.glob("own-4-*")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples and all("What color is the" in sample["prompt"] for sample in samples)
    assert all(sample["prompt"].startswith("The background is") for sample in samples)
    (logged,) = read_csv(folder / "metrics.csv")
    assert (float(logged["rows_scored"]) == 0) == isinstance(scoring, Paid)
    assert float(logged["causal_share"]) > 0  # no token is silent


def test_a_run_that_ended_early_is_not_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(claims.train, "train", lambda *_: None)  # as after Ctrl-C
    with pytest.raises(RuntimeError, match="ended at step 0"):
        claims.run_arm("copo", tiny["copo"], 0, tmp_path, scenes=1)

    def fails(*_):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(claims.train, "train", fails)
    with pytest.raises(RuntimeError, match="ended at step 0: not finite"):
        claims.run_arm("copo", tiny["copo"], 0, tmp_path, scenes=1)


# -- all runs -----------------------------------------------------------------------------------
@pytest.fixture
def here(monkeypatch, tmp_path):
    """Jobs done at once in this process, from a warm start with the weights "a"; its weights can be set."""
    begun, weights = [], {"": "a"}

    class Pool:
        def __init__(self, *_, **__):
            pass

        def submit(self, work, log, *given):
            job = Future()
            try:
                job.set_result(given[0](*given[1:]))
            except RuntimeError as error:
                job.set_exception(error)
            return job

        def shutdown(self, cancel_futures):
            assert cancel_futures

    def start(cache, settings):
        begun.append(settings)
        return settings

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Pool)
    for module in (jobs, claims):
        monkeypatch.setattr(module, "warm_start", start)
        monkeypatch.setattr(module, "hash_of", lambda s: weights.get(s.seed, weights[""]))
    return begun, weights


def test_a_run_that_the_csv_holds_is_not_run_again(tiny, here, tmp_path, monkeypatch):
    ran, (begun, weights) = [], here

    def run(name, arm, seed, work, scenes):
        ran.append((name, seed))
        if (name, seed) == ("copo", 0):
            raise RuntimeError("training ended at step 1")
        facts = {"arm": name, "seed": seed, "setting": "independent", "start": weights[""]}
        return [facts | {"step": step} for step in arm.steps]

    def do(arms, seeds):
        ran.clear()
        given = tmp_path / "runs.csv", tmp_path, 1
        return jobs.do_all(claims.run_jobs(arms, seeds, *given), tmp_path, 1)

    monkeypatch.setattr(claims, "run_arm", run)
    assert do({"grpo": tiny["grpo"]}, 2) == []
    assert ran == [("warm start", ""), ("grpo", 0), ("grpo", 1)] and begun == [IN_CLEAR_AIR]
    (failed,) = do(tiny, 2)
    assert ran == [("copo", 0), ("copo", 1)]
    assert failed.startswith("copo 0: training ended at step 1") and "copo-0.log" in failed
    rows = read_csv(tmp_path / "runs.csv")
    assert sorted((row["arm"], row["seed"], row["step"]) for row in rows) == [
        ("copo", "1", "1"), ("copo", "1", "2"), ("grpo", "0", "1"), ("grpo", "0", "2"),
        ("grpo", "1", "1"), ("grpo", "1", "2"), ("warm start", "", "0"),
    ]  # fmt: skip
    assert all(row["commit"] for row in rows)
    assert do({"grpo": replace(tiny["grpo"], steps=(1, 2, 3))}, 1) == []
    assert ran == [("grpo", 0)]  # for the step it lacks; its rows are not doubled
    assert len(read_csv(tmp_path / "runs.csv")) == len(rows) + 1
    weights[""] = "b"  # as on another machine
    (failed,) = do(tiny, 3)  # a line for them all
    assert ran == [] and "runs.csv" in failed and "processors round differently" in failed


def test_runs_with_a_start_of_their_own_follow_that_of_their_seed(
    tiny, here, tmp_path, monkeypatch
):
    ran, (_, weights) = [], here
    weights |= {0: "a", 1: "b"}

    def run(name, arm, seed, work, scenes):
        ran.append((name, seed))
        facts = {"arm": name, "seed": seed, "setting": "independent", "start": weights[seed]}
        return [facts | {"step": step} for step in arm.steps]

    def do(seeds):
        ran.clear()
        given = tmp_path / "runs.csv", tmp_path, 1
        return jobs.do_all(claims.run_jobs(own, seeds, *given), tmp_path, 1)

    own = {name: replace(arm, own_start=True) for name, arm in tiny.items()}
    before = {"warm start, own": Arm(steps=(0,), start=IN_CLEAR_AIR, own_start=True)}
    monkeypatch.setattr(claims, "BEFORE", before)
    monkeypatch.setattr(claims, "run_arm", run)
    assert do(1) == [] and ran == [("warm start, own", 0), ("grpo", 0), ("copo", 0)]
    weights[0] = "c"  # another machine: seed 0 is complete, seed 1 begins here
    assert do(2) == [] and ran == [("warm start, own", 1), ("grpo", 1), ("copo", 1)]
    own["more"] = own["grpo"]
    (failed,) = do(1)
    assert ran == [] and "processors round differently" in failed


def test_questions_of_tokens_are_asked_once_per_seed_and_not_of_another_warm_start(
    tiny, here, tmp_path, monkeypatch
):
    asked = []

    def question(name):
        def answer(batch, seed):
            asked.append((name, seed))
            return [{"class": "all", "n": 1}, {"class": "auc", "n": 2}]

        return answer

    questions = {name: (question(name), prompts) for name, (_, prompts) in tokens.QUESTIONS.items()}
    monkeypatch.setattr(tokens, "QUESTIONS", questions)
    monkeypatch.setattr(tokens, "sample_batch", lambda *_: None)
    monkeypatch.setattr(claims, "load_policy", lambda start: None)

    def do(seeds):
        asked.clear()
        return jobs.do_all(claims.token_jobs(seeds, tmp_path, tmp_path), tmp_path, 2)

    assert do(1) == []
    assert asked == [(name, 0) for name in ("credit", "mask", "estimator")]  # the longest first
    (tmp_path / "mask.csv").write_text("seed,start,class\n0,b,all\n")
    (failed,) = do(2)
    assert asked == [("credit", 1), ("estimator", 1)] and "mask.csv" in failed
    rows = read_csv(tmp_path / "credit.csv")
    assert [(row["seed"], row["n"], row["start"]) for row in rows] == [
        ("0", "1", "a"), ("0", "2", "a"), ("1", "1", "a"), ("1", "2", "a"),
    ]  # fmt: skip
    assert all(row["commit"] and row["command"] for row in rows)


def test_questions_follow_the_warm_start_that_runs_begin_at_too(tiny, here, tmp_path, monkeypatch):
    begun, _ = here
    monkeypatch.setattr(claims, "run_arm", lambda *given: [])
    monkeypatch.setattr(claims, "ask", lambda *given: [])
    fog = {name: replace(arm, start=claims.IN_FOG) for name, arm in tiny.items()}
    monkeypatch.setattr(claims, "BEFORE", {"warm start": Arm(steps=(0,))})
    todo = claims.run_jobs(fog, 1, tmp_path / "runs.csv", tmp_path, 1)
    todo += claims.token_jobs(1, tmp_path, tmp_path)
    assert jobs.do_all(todo, tmp_path, 2) == []
    assert begun == [claims.IN_FOG]  # made once


def test_token_forwards_are_what_a_step_draws_updates_and_scores():
    row = {"completion_length": "10.5", "scoring_token_forwards": "7"}
    settings = runs.Settings(batch_size=2, num_generations=3)
    assert claims.forwards(settings, row) == 3 * 63 + 7  # drawn, updated, under the reference
    assert claims.forwards(replace(settings, beta=0.0), row) == 2 * 63 + 7


def test_a_worker_leaves_its_output_in_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(jobs, "disable_progress_bar", lambda: None)
    log = jobs.log_of(tmp_path, "grpo, clear 2")
    jobs.in_worker(log, print, "ran", "grpo")
    assert (tmp_path / "logs" / "grpo-clear-2.log").read_text() == "ran grpo\n"


# -- the run of `make train`, and the command line ----------------------------------------------
def test_the_first_run_is_kept_as_it_was_printed_and_not_run_again(tmp_path, monkeypatch):
    figures = dict.fromkeys(("accuracy", "chair_s", "chair_i", "recall", "flip_rate"), 0.25)
    f1 = {"f1": 0.75, "yes_ratio": 0.5}
    figures |= {"n": 3, "length": 7, "pope": {"random": f1, "popular": f1, "adversarial": f1}}
    settings = ("confounded", "independent")
    measured = {"before": dict.fromkeys(settings, figures)}  # no "after", as after Ctrl-C
    ran, first = [], tmp_path / "runs" / "first"

    def trained(command):
        ran.append(command)
        folder = claims.Path(command[1])
        folder.mkdir(parents=True, exist_ok=True)
        accuracy = 0.5 if folder == first / "grpo" else 0.75
        found = measured | {"after": dict.fromkeys(settings, figures | {"accuracy": accuracy})}
        (folder / "evaluation.json").write_text(json.dumps(found if len(ran) > 1 else measured))

    monkeypatch.setattr(claims.train, "main", trained)
    path = tmp_path / "results" / "first.csv"
    assert claims.first_run(path, tmp_path / "runs", 1) and not path.exists()
    assert claims.first_run(path, tmp_path / "runs", 1) == []
    grpo = ["--output", str(first / "grpo"), "--lambda-s", "0", "--lambda-n", "0", "--resume"]
    assert ran[1] == ["--output", str(first / "run"), "--resume"] and ran[2] == grpo
    assert claims.first_run(path, tmp_path / "runs", 1) == [] and len(ran) == 3
    rows = read_csv(path)
    # COPO's run was resumed: how long it took is not known
    assert (rows[-1]["figure"], rows[-1]["copo"], rows[-1]["grpo"]) == ("seconds", "", "0")
    assert rows[0]["command"] == (
        f"train.py --output {first / 'run'}; train.py {' '.join(grpo[:-1])}"
    )
    columns = {name: measured["before"] for name in ("warm_start", "grpo", "copo")}
    for name, accuracy in (("grpo", 0.5), ("copo", 0.75)):
        columns[name] = dict.fromkeys(settings, figures | {"accuracy": accuracy})
    assert [(row["scenes"], row["figure"], *(row[c] for c in columns)) for row in rows[:-1]] == [
        (title, heading, *values)
        for title, found in compare_rows(columns).items()
        for heading, values in found
    ]

    assert claims.first_run(path, tmp_path / "runs", 2) == [] and len(ran) == 5  # seed 1 alone
    assert ran[3] == ["--output", str(first / "run-1"), "--seed", "1", "--resume"]
    assert {row["seed"] for row in read_csv(path)} == {"0", "1"}


def test_what_cannot_be_used_ends_with_a_line_and_code_2(capsys):
    assert claims.main(["runs", "--workers", "0"]) == 2
    assert claims.main(["runs", "--seeds", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "--workers" in lines[0] and "--seeds" in lines[1]


def test_every_arm_asks_the_paper_s_questions_of_every_token_however_long_it_reasons(tmp_path):
    assert {arm.settings(0, tmp_path).unit for arm in ARMS.values()} == {"token"}
