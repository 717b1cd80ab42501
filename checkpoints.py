"""Checkpoints that are whole or not there, in safetensors and JSON only.

A checkpoint is an ordinary Hugging Face folder (`--model runs/x/checkpoint` loads it) with two files
more, which resuming needs: optimizer.safetensors, and state.json, which says the step and the hash of
every other file. It is written beside the last one and then takes its name, so that at any moment one of
the two is whole; the ones before it are kept as checkpoint-STEP.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import Policy

_NEW = ".new"


def save(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int, keep: int = 1
) -> None:
    """Write the checkpoint of a finished step as `folder`, and keep the `keep` newest in all.

    Raises OSError where it cannot be written (a full disk); what was there before is then as it was.
    """
    new = folder.with_name(folder.name + _NEW)
    shutil.rmtree(new, ignore_errors=True)
    try:
        policy.save(new)
        tensors = {
            f"{index}.{name}": value
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        save_file(tensors, new / "optimizer.safetensors")
        state = {"step": step, "sha256": _hashes(new)}
        (new / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        for path in _files(
            new
        ):  # on disk before the name changes: a power cut leaves one of the two
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        before = _state(folder)
        aside = folder.with_name(f"{folder.name}-{before['step'] if before else 'broken'}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    new.rename(folder)
    for old in _older(folder)[max(keep - 1, 0) :]:
        shutil.rmtree(old, ignore_errors=True)


def find(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; each that is not whole is named on stderr."""
    for candidate in (folder, *_older(folder)):
        if not candidate.exists():
            continue
        fault = _fault(candidate)
        if fault is None:
            return candidate
        print(f"{candidate}: {fault}: looking for the one before it", file=sys.stderr)
    return None


def restore(checkpoint: Path, optimizer: torch.optim.Optimizer) -> int:
    """Put the optimiser back as it was; returns the steps done.  The weights are `load_policy`'s."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return json.loads((checkpoint / "state.json").read_text())["step"]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hashes(folder: Path) -> dict[str, str]:
    """The hash of every file but state.json, by its path in the folder."""
    hashes = {}
    for path in _files(folder):
        if path.name != "state.json":
            with open(path, "rb") as file:
                name = path.relative_to(folder).as_posix()
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _state(folder: Path) -> dict | None:
    """What state.json says, or None where it is missing or broken."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return (
            state if isinstance(state["step"], int) and isinstance(state["sha256"], dict) else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    state = _state(folder)
    if state is None:
        return "its state.json is missing or broken"
    hashes = _hashes(folder)
    for name, expected in state["sha256"].items():
        if hashes.get(name) != expected:
            return f"{name} is {'changed' if name in hashes else 'missing'} since it was written"
    return None


def _older(folder: Path) -> list[Path]:
    """The checkpoints kept beside `folder`, newest first."""
    found = [
        (int(number), path)
        for path in folder.parent.glob(f"{folder.name}-*")
        if (number := path.name.removeprefix(f"{folder.name}-")).isdigit()
    ]
    return [path for _, path in sorted(found, reverse=True)]
