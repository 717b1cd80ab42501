"""Checkpoints that are whole or not there, in safetensors and JSON only.

A checkpoint is an ordinary Hugging Face folder (`--model runs/x/checkpoint` loads it) with two files
more, which resuming needs: optimizer.safetensors and state.json. It is written beside the last one
and then takes its name; state.json, written last, says that the rest is there.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import Policy

_NEW, _OLD = ".new", ".old"


def save(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the checkpoint of a finished step in the place of the one before."""
    new, old = folder.with_name(folder.name + _NEW), folder.with_name(folder.name + _OLD)
    shutil.rmtree(new, ignore_errors=True)
    policy.save(new)
    tensors = {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, new / "optimizer.safetensors")
    (new / "state.json").write_text(json.dumps({"step": step}) + "\n")
    for path in (
        new.iterdir()
    ):  # on disk before the name changes, so that a power cut leaves one of the two
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find(folder: Path) -> Path | None:
    """The newest whole checkpoint: of this name, or its predecessor if a save was cut short."""
    for candidate in (folder, folder.with_name(folder.name + _OLD)):
        if (candidate / "state.json").is_file():
            return candidate
    return None


def restore(checkpoint: Path, optimizer: torch.optim.Optimizer) -> int:
    """Put the optimiser back as it was; returns the steps done.  The weights are `load_policy`'s."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return json.loads((checkpoint / "state.json").read_text())["step"]
