"""Work in processes of its own, all of it one queue: what begins at a warm start follows once it is there."""

import contextlib
import hashlib
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from tiny import WarmStart, warm_start

ELSEWHERE = "processors round differently; give --output another folder and run them all here"


@dataclass(frozen=True)
class Job:
    """Work that begins at a warm start, and what is done with its result in this process."""

    name: str
    start: WarmStart
    work: Callable[..., Any]
    given: tuple
    keep: Callable[[Any], None]  # rows are written as soon as they are known
    output: Path  # the CSV that they belong to
    beside: frozenset[str]  # `hash_of` the warm start of the rows there that they are compared with


def do_all(jobs: Sequence[Job], cache: Path, workers: int) -> list[str]:
    """Every job, `workers` at once, a thread each; returns what failed, and why: the others go on.

    cache: of the warm starts; the output of each job goes to its folder `logs`. From another warm start than
    that of the rows beside them no row is added: it could be paired with none.
    """
    following: dict[WarmStart, list[Job]] = {}
    for job in jobs:
        following.setdefault(job.start, []).append(job)
    failed: list[str] = []
    doing: dict[Future, tuple[str, WarmStart | Job]] = {}
    bar = tqdm(total=len(jobs), desc="runs and questions", unit="job")
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def submit(name: str, of: WarmStart | Job, work: Callable, *given: object) -> None:
        doing[pool.submit(in_worker, log_of(cache, name), work, *given)] = name, of

    try:
        for start, its_jobs in following.items():
            submit(f"start of {its_jobs[0].name}", start, warm_start, cache, start)
        while doing:
            for ended in wait(doing, return_when=FIRST_COMPLETED).done:
                name, of = doing.pop(ended)
                try:
                    found = ended.result()
                except Exception as error:
                    failed.append(f"{name}: {error}: see {log_of(cache, name)}")
                    continue
                if isinstance(of, Job):
                    of.keep(found)
                    bar.update()
                    continue
                weights = hash_of(found)
                for job in following[of]:
                    if job.beside - {weights}:
                        failed.append(f"{job.output}: of another warm start: {ELSEWHERE}")
                    else:
                        submit(job.name, job, job.work, *job.given)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return list(dict.fromkeys(failed))


def in_worker(log: Path, work: Callable, *given: object) -> Any:
    """What work returns, on one thread, its output in a file."""
    torch.set_num_threads(1)
    disable_progress_bar()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return work(*given)


def log_of(cache: Path, name: str) -> Path:
    """Where a job's own output goes."""
    return cache / "logs" / f"{slug(name)}.log"


def slug(name: str) -> str:
    """A name as part of a path."""
    return name.replace(", ", "-").replace(" ", "-").lower()


def hash_of(start: Path) -> str:
    """Which weights a run begins with."""
    return hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()[:12]
