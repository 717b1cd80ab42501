"""The systems that the paper compares with, each on one warm start in fog      -> baselines.csv

    make baselines                       every row that is not there yet, resumed where it stopped
    make baselines QUICK=1               one seed of a few, beside the committed rows

    python -m experiments.baselines --systems hadpo deco --seeds 2

What is drawn has five seeds, and so has what is trained. Seeds come in turn, so that at any time what is
done can be paired. GRPO, COPO and greedy answers are rows of runs.csv. Seconds are the processor's, of one
thread, making pairs included: what else the machine does is not in them.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: see train.py

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from baselines.making import PAIRS, Method
from baselines.preference import learn
from baselines.settings import OPERA, VCD, Beam, DeCo, DoLa, Plain, Rule
from data import DataError
from experiments.arms import IN_FOG
from experiments.claims import ELSEWHERE, hash_of
from experiments.records import commit, read_csv, write_csv
from experiments.systems import DECODED, FIGURES, SCENES
from hallucination.answers import Decoding, answer_all
from hallucination.scenes import scene_questions, score_scenes
from model import Policy, load_policy
from runs import Settings
from tiny import warm_start

RESULTS, WORK = Path("experiments/results/baselines.csv"), Path("runs/baselines")
COLUMNS = (
    "system", "seed", "scenes", *FIGURES, "accuracy", "malformed", "forwards", "seconds", "pairs", "prompts",
    "start", "commit", "command",
)  # fmt: skip
AT_ONCE = 64  # prompts whose pairs are made together


@dataclass(frozen=True)
class Decoder:
    """A rule of decoding.  seeds: 1 where nothing is drawn."""

    rule: Rule | None
    temperature: float = 0.0
    seeds: int = 1
    scenes: int = SCENES


@dataclass(frozen=True)
class Learner:
    """Rounds of pairs and steps on them, each from where the one before ended."""

    rounds: tuple[tuple[Method, int], ...]
    rate: float | None = None  # of learning; None: 1e-4, that of GRPO and COPO
    seeds: int = 5
    scenes: int = SCENES


def learner(*rounds: tuple[str, int, dict], rate: float | None = None) -> Learner:
    """Rounds of (pairs, steps, what differs): 16 pairs for every step, each used once."""
    made = [
        (Method(pairs, num_pairs=16 * steps, prompts_at_once=AT_ONCE, **others), steps)
        for pairs, steps, others in rounds
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


def measure(policy: Policy, decoding: Decoding, scenes: int, save: Path | None = None) -> dict:
    """A policy's figures on independent held-out scenes in fog."""
    world, setting = IN_FOG.world, ("independent",)
    questions = scene_questions(scenes, world, setting)
    texts = answer_all(lambda: policy, questions, decoding, save, 128, what=decoding.model_id)
    found = score_scenes(scenes, texts, world, setting)["independent"]
    pope = found["pope"]["adversarial"]
    row = {key: found[key] for key in FIGURES if key in found} | {"scenes": scenes}
    row |= {key: found[key] for key in ("accuracy", "malformed")}
    return row | {"pope_adversarial": pope["f1"], "yes_ratio_adversarial": pope["yes_ratio"]}


def train(system: Learner, seed: int, start: Path, folder: Path) -> tuple[Policy, dict]:
    """The rounds of a system, resumed where they stopped.  Returns the policy, and what it took."""
    pairs = prompts = 0
    used = folder / "seconds.json"  # of the calls before this one
    seconds = json.loads(used.read_text()) if used.exists() else 0.0
    for number, (method, steps) in enumerate(system.rounds):
        output, began = folder / f"round-{number + 1}", time.process_time()
        learn(
            Settings(
                output=output, resume=True, steps=steps, save_steps=steps, keep_checkpoints=1,
                seed=seed + 1000 * number, fog=IN_FOG.world.fog, device="cpu", dtype="float32",
                learning_rate=system.rate,
            ),
            method,
            start,
        )  # fmt: skip
        seconds += time.process_time() - began
        used.write_text(json.dumps(seconds))
        lines = [json.loads(line) for line in (output / PAIRS).read_text().splitlines()]
        pairs, prompts = pairs + method.num_pairs, prompts + sum(line["prompts"] for line in lines)
        start = output / "checkpoint"
    return load_policy(start), {"pairs": pairs, "prompts": prompts, "seconds": seconds}


def run_one(name: str, seed: int, start: Path, work: Path) -> dict:
    """One row: a system with one seed."""
    system = SYSTEMS[name]
    folder = work / f"{name}-{seed}-{hash_of(start)}".replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    row = {"system": name, "seed": seed, "start": hash_of(start)}
    row["command"] = f'python -m experiments.baselines --systems "{name}" --seeds {seed + 1}'
    if isinstance(system, Learner):
        policy, took = train(system, seed, start, folder)
        return row | took | {"forwards": 1} | measure(policy, Decoding(name), system.scenes)
    decoding = Decoding(name, temperature=system.temperature, seed=seed, rule=system.rule)
    figures = measure(load_policy(start), decoding, system.scenes, folder / "answers.jsonl")
    return row | {"forwards": dict(DECODED)[name]} | figures


def run_all(names: Sequence[str], seeds: int | None, output: Path, work: Path) -> None:
    """Every system and seed that the CSV does not hold; a row is written as soon as it is known.

    Raises DataError where the CSV is of another warm start.
    """
    start, rows, of = warm_start(work, IN_FOG), read_csv(output), commit()
    if {row["start"] for row in rows} - {hash_of(start)}:
        raise DataError(f"{output}: of another warm start: {ELSEWHERE}")
    done = {(row["system"], int(row["seed"])) for row in rows}
    wanted = [
        (name, seed)
        for seed in range(seeds or max(SYSTEMS[name].seeds for name in names))
        for name in names
        if seed < SYSTEMS[name].seeds and (name, seed) not in done
    ]
    for name, seed in tqdm(wanted, desc="systems", unit="row"):
        rows.append(run_one(name, seed, start, work) | {"commit": of})
        write_csv(output, rows, COLUMNS)


def compare(quick: Path, committed: Path) -> str:
    """The rows of a quick run beside the committed ones of the same system and seed."""
    of = {(row["system"], row["seed"]): row for row in read_csv(committed)}
    lines = []
    for row in read_csv(quick):
        other = of.get((row["system"], row["seed"]), {})
        lines.append(f"{row['system']}, seed {row['seed']}")
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
        names, args.seeds = list(QUICK), 1
        args.output, args.work = Path("runs/quick/baselines.csv"), Path("runs/quick")
    torch.set_num_threads(1)
    disable_progress_bar()
    try:
        if args.seeds is not None and args.seeds < 1:
            raise DataError("--seeds must be at least 1")
        run_all(names, args.seeds, args.output, args.work)
        if args.quick:
            print(compare(args.output, RESULTS))
    except (DataError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
