"""The systems that the paper compares with, in fog and in crowded scenes      -> baselines.csv

    make baselines                       every row that is not there yet, resumed where it stopped
    make baselines QUICK=1               one seed of a few, beside the committed rows

    python -m experiments.baselines --systems hadpo deco --seeds 2 --worlds fog

In fog all begin at one warm start; in crowds each seed has a warm start of its own, as the arms of arms.py
have. What is drawn has five seeds, and so has what is trained. Seeds come in turn, so that at any time what
is done can be paired. GRPO, COPO and greedy answers are rows of runs.csv. Seconds are the processor's, of one
thread, making pairs included: what else the machine does is not in them.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: see train.py

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from baselines.making import PAIRS, Method
from baselines.preference import learn
from baselines.settings import OPERA, VCD, Beam, DeCo, DoLa, Plain, Rule
from data import DataError
from experiments.arms import IN_FOG
from experiments.jobs import ELSEWHERE, hash_of
from experiments.records import commit, read_csv, write_csv
from experiments.systems import COUNTING, DECODED, FIGURES, SCENES
from hallucination.answers import Decoding, answer_all
from hallucination.scenes import scene_questions, score_scenes
from model import Policy, load_policy
from runs import Settings
from tiny import IN_CROWDS, WarmStart, warm_start

RESULTS, WORK = Path("experiments/results/baselines.csv"), Path("runs/baselines")
COLUMNS = (
    "system", "world", "seed", "scenes", *FIGURES, *COUNTING, "accuracy", "malformed", "forwards", "seconds",
    "pairs", "prompts", "start", "commit", "command",
)  # fmt: skip
AT_ONCE = 64  # prompts whose pairs are made together


@dataclass(frozen=True)
class Where:
    """A world that systems are compared in.

    settings: what differs there from preference.py's own.  times: steps taken for each of a learner's.
    own_start: each seed has its own warm start.
    """

    start: WarmStart
    settings: dict
    times: int = 1
    own_start: bool = False

    def start_of(self, seed: int) -> WarmStart:
        """The settings of the warm start that a row with this seed begins at."""
        return replace(self.start, seed=seed) if self.own_start else self.start


WORLDS = {  # in crowds GRPO and COPO take 80 steps of 4 prompts, and so do the others, of 4 pairs
    "fog": Where(IN_FOG, {"fog": IN_FOG.world.fog}),
    "crowds": Where(IN_CROWDS, {"crowds": True, "batch_size": 4}, times=2, own_start=True),
}


@dataclass(frozen=True)
class Decoder:
    """A rule of decoding.  seeds: 1 where nothing is drawn."""

    rule: Rule | None
    temperature: float = 0.0
    seeds: int = 1
    scenes: int = SCENES


@dataclass(frozen=True)
class Learner:
    """Rounds of pairs and steps on them, each from where the one before ended; every pair is used once."""

    rounds: tuple[tuple[Method, int], ...]
    rate: float | None = None  # of learning; None: 1e-4, that of GRPO and COPO
    seeds: int = 5
    scenes: int = SCENES


def learner(*rounds: tuple[str, int, dict], rate: float | None = None) -> Learner:
    """Rounds of (pairs, steps, what differs)."""
    made = [
        (Method(pairs, prompts_at_once=AT_ONCE, **more), steps) for pairs, steps, more in rounds
    ]
    return Learner(tuple(made), rate)


OPERAS = 20  # scenes: it answers one question at a time, by 30 forwards per token
CSR = (14, 13, 13)  # steps of its three rounds
PAIRED: dict[str, tuple[tuple[str, int, dict], ...]] = {
    "hadpo": (("hadpo", 40, {}),),
    "povid": (("povid", 30, {}), ("povid", 10, {"stage": 2})),
    "chair": (("chair", 40, {"beta": 0.2, "temperature": 0.7}),),
    "csr-pull": tuple(("csr", steps, {}) for steps in CSR),
    "csr-oracle": tuple(("csr", steps, {"judge": "oracle"}) for steps in CSR),
}
RATES = {"": None, ", rate 1e-5": 1e-5}
SYSTEMS: dict[str, Decoder | Learner] = {
    "sample": Decoder(None, 1.0, 5),
    "beam": Decoder(Beam()),
    "vcd": Decoder(VCD(), 1.0, 5),
    "vcd, alpha 0": Decoder(VCD(alpha=0.0), 1.0, 5),
    "dola": Decoder(DoLa(layers="1,2")),
    "dola's penalty alone": Decoder(Plain(repetition_penalty=1.2)),
    "deco": Decoder(DeCo()),
    "deco, alpha 0": Decoder(DeCo(alpha=0.0)),
    **{
        f"{name}{suffix}": learner(*rounds, rate=rate)
        for suffix, rate in RATES.items()
        for name, rounds in PAIRED.items()
    },
    "hadpo, chosen alone": learner(("hadpo", 40, {"loss": "likelihood"})),
    "povid, chosen alone": learner(("povid", 40, {"loss": "likelihood"})),
    "greedy": Decoder(None, scenes=OPERAS),
    "opera, alpha 0": Decoder(OPERA(alpha=0.0, rollbacks=0), scenes=OPERAS),
    "opera": Decoder(OPERA(), scenes=OPERAS),
}
QUICK = ("beam", "deco", "hadpo")  # one of each family: plain, a rule, trained


def seeds_of(name: str, where: Where) -> int:
    """How many a system has: one start for every seed makes five of a rule that draws nothing, too."""
    system = SYSTEMS[name]
    return 5 if where.own_start and system.scenes == SCENES else system.seeds


def measure(
    policy: Policy, decoding: Decoding, where: Where, scenes: int, save: Path | None = None
) -> dict:
    """A policy's figures on independent held-out scenes."""
    world, setting = where.start.world, ("independent",)
    questions = scene_questions(scenes, world, setting)
    texts = answer_all(lambda: policy, questions, decoding, save, 128, what=decoding.model_id)
    found = score_scenes(scenes, texts, world, setting)["independent"]
    pope = found["pope"]["adversarial"]
    row = {key: found[key] for key in FIGURES if key in found} | {"scenes": scenes}
    row |= {key: found[key] for key in ("accuracy", "malformed")}
    counted = found["counting"]
    row |= {"counts": counted["accuracy"], "counts_chair_s": counted["chair_s"]}
    return row | {"pope_adversarial": pope["f1"], "yes_ratio_adversarial": pope["yes_ratio"]}


def train(
    system: Learner, where: Where, seed: int, start: Path, folder: Path
) -> tuple[Policy, dict]:
    """The rounds of a system, resumed where they stopped.  Returns the policy, and what it took."""
    pairs = prompts = 0
    used = folder / "seconds.json"  # of the calls before this one
    seconds = json.loads(used.read_text()) if used.exists() else 0.0
    for number, (method, steps) in enumerate(system.rounds):
        output, began = folder / f"round-{number + 1}", time.process_time()
        steps *= where.times
        settings = Settings(
            output=output, resume=True, steps=steps, save_steps=steps, keep_checkpoints=1,
            seed=seed + 1000 * number, device="cpu", dtype="float32", learning_rate=system.rate,
            **where.settings,
        )  # fmt: skip
        method = replace(method, num_pairs=settings.batch_size * steps)
        learn(settings, method, start)
        seconds += time.process_time() - began
        used.write_text(json.dumps(seconds))
        lines = [json.loads(line) for line in (output / PAIRS).read_text().splitlines()]
        pairs, prompts = pairs + method.num_pairs, prompts + sum(line["prompts"] for line in lines)
        start = output / "checkpoint"
    return load_policy(start), {"pairs": pairs, "prompts": prompts, "seconds": seconds}


def run_one(name: str, world: str, seed: int, start: Path, work: Path) -> dict:
    """One row: a system in a world with one seed."""
    system, where = SYSTEMS[name], WORLDS[world]
    folder = work / f"{name}-{seed}-{hash_of(start)}".replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    row = {"system": name, "world": world, "seed": seed, "start": hash_of(start)}
    row["command"] = (
        f'python -m experiments.baselines --systems "{name}" --worlds {world} --seeds {seed + 1}'
    )
    if isinstance(system, Learner):
        policy, took = train(system, where, seed, start, folder)
        return row | took | {"forwards": 1} | measure(policy, Decoding(name), where, system.scenes)
    decoding = Decoding(name, temperature=system.temperature, seed=seed, rule=system.rule)
    save = folder / "answers.jsonl"
    figures = measure(load_policy(start), decoding, where, system.scenes, save)
    return row | {"forwards": dict(DECODED)[name]} | figures


def run_all(
    names: Sequence[str], worlds: Sequence[str], seeds: int | None, output: Path, work: Path
) -> None:
    """Every system, world and seed that the CSV does not hold; a row is written as soon as it is known.

    Raises DataError where the CSV is of another warm start.
    """
    rows, of = read_csv(output), commit()
    done = {(row["system"], row["world"], int(row["seed"])) for row in rows}
    wanted = [
        (name, world, seed)
        for seed in range(seeds or max(seeds_of(name, WORLDS[w]) for name in names for w in worlds))
        for world in worlds
        for name in names
        if seed < seeds_of(name, WORLDS[world]) and (name, world, seed) not in done
    ]
    for name, world, seed in tqdm(wanted, desc="systems", unit="row"):
        where = WORLDS[world]
        start = warm_start(work, where.start_of(seed))
        beside = [
            row["start"]
            for row in rows
            if row["world"] == world and (not where.own_start or int(row["seed"]) == seed)
        ]
        if set(beside) - {hash_of(start)}:
            raise DataError(f"{output}: of another warm start: {ELSEWHERE}")
        rows.append(run_one(name, world, seed, start, work) | {"commit": of})
        write_csv(output, rows, COLUMNS)


def compare(quick: Path, committed: Path) -> str:
    """The rows of a quick run beside the committed ones of the same system, world and seed."""
    keys = ("system", "world", "seed")
    of = {tuple(row[key] for key in keys): row for row in read_csv(committed)}
    lines = []
    for row in read_csv(quick):
        other = of.get(tuple(row[key] for key in keys), {})
        lines.append(f"{row['system']}, in {row['world']}, seed {row['seed']}")
        lines += [f"  {name:<24}{row[name]:>10}{other.get(name, '-'):>10}" for name in FIGURES]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing.  Returns the exit code: 0, or 2 where something could not be run."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--systems", nargs="*", choices=SYSTEMS, metavar="SYSTEM", help="without it, all"
    )
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), help="where")
    parser.add_argument(
        "--seeds", type=int, help="of each at most; without it, five where one is drawn"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the CSV")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder of the runs and of the warm start"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed of a few into runs/quick, whatever else is asked",
    )
    args = parser.parse_args(argv)
    names = args.systems or list(SYSTEMS)
    if args.quick:
        names, args.worlds, args.seeds = list(QUICK), ["fog"], 1
        args.output, args.work = Path("runs/quick/baselines.csv"), Path("runs/quick")
    torch.set_num_threads(1)
    disable_progress_bar()
    try:
        if args.seeds is not None and args.seeds < 1:
            raise DataError("--seeds must be at least 1")
        run_all(names, args.worlds, args.seeds, args.output, args.work)
        if args.quick:
            print(compare(args.output, RESULTS))
    except (DataError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
