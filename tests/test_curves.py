"""--log-to draws the columns of metrics.csv with the writers of tensorboard and wandb."""

import csv
import importlib.machinery
import sys
import types

import pytest

import train
from runs import Curves, Settings

FEW = ["--batch-size", "1", "--num-generations", "2", "--max-completion-length", "8",
       "--lambda-s", "0", "--lambda-n", "0", "--eval-scenes", "0", "--device", "cpu"]  # fmt: skip


class Writer:
    """What SummaryWriter and a run of wandb are told, in one list over all of them."""

    told: list[tuple]

    def __init__(self, *given, **named):
        self.told.append(("begin", *given, named))

    def add_scalar(self, name, value, step):
        self.told.append((step, name, value))

    def log(self, figures, step):
        self.told += [(step, name, value) for name, value in figures.items()]

    def flush(self):
        pass

    def close(self):
        self.told.append(("end",))

    finish = close


@pytest.fixture(params=["tensorboard", "wandb"])
def told(request, monkeypatch):
    """(name of the package, what it is told), where a fake of it is installed."""
    name = request.param
    package = types.ModuleType(name)
    package.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
    writer = type("Fake", (Writer,), {"told": []})
    package.init = package.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    return name, writer.told


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_of_metrics_csv_is_drawn_and_a_resumed_run_goes_on(told, speaker, tmp_path):
    name, told = told
    flags = [*FEW, "--model", str(speaker), "--output", str(tmp_path / "run"), "--log-to", name]
    assert train.main([*flags, "--steps", "2"]) == 0
    assert train.main([*flags, "--steps", "3", "--resume"]) == 0
    drawn = [(step, what, f"{value:.6g}") for step, what, value in filter(is_figure, told)]
    assert drawn == [
        (int(row["step"]), column, cell)
        for row in rows_of(tmp_path / "run")
        for column, cell in row.items()
        if column != "step" and cell
    ]
    begins = [entry for entry in told if entry[0] == "begin"]
    assert [entry[0] for entry in (told[0], told[-1])] == ["begin", "end"] and len(begins) == 2
    (*first, named), (*second, again) = begins
    if name == "tensorboard":
        assert first == second == ["begin", tmp_path / "run" / "tensorboard"]
        assert (named, again) == ({"purge_step": 0}, {"purge_step": 3})
    else:
        assert named["id"] == again["id"] and named["resume"] == "allow"
        assert named["config"]["num_generations"] == 2 and named["dir"] == tmp_path / "run"


def is_figure(entry):
    return isinstance(entry[0], int)


def test_a_run_that_begins_again_has_curves_of_its_own(told, tmp_path):
    name, told = told
    for _ in range(2):
        Curves(Settings(log_to=name), tmp_path, 0).close()
    named = [entry[-1] for entry in told if entry[0] == "begin"]
    if name == "tensorboard":
        assert named == [{"purge_step": 0}] * 2  # what was drawn is hidden
    else:
        assert named[0]["id"] != named[1]["id"]


def test_the_curves_end_where_a_run_fails(told, speaker, tmp_path, monkeypatch):
    name, told = told

    def failing(*_):
        raise FloatingPointError("no step")

    monkeypatch.setattr(train, "train_step", failing)
    flags = [*FEW, "--model", str(speaker), "--output", str(tmp_path), "--log-to", name]
    assert train.main(flags) == 2
    assert [entry[0] for entry in told] == ["begin", "end"]


def test_what_the_package_refuses_begins_no_run(told, speaker, tmp_path, monkeypatch, capsys):
    name, _ = told

    def refuse(*_, **named):
        raise ValueError("no login")

    monkeypatch.setattr(sys.modules[name], "init", refuse)
    monkeypatch.setattr(sys.modules[name], "SummaryWriter", refuse)
    flags = [*FEW, "--model", str(speaker), "--output", str(tmp_path), "--log-to", name]
    assert train.main(flags) == 2 and not (tmp_path / "args.json").exists()
    assert "ValueError: no login" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_where_it_is_not_installed_one_line_says_so_before_anything_is_made(
    name, tmp_path, capsys, monkeypatch
):
    real = train.sys.modules["importlib.util"].find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == name else real(n, *a)
    )
    assert train.main([*FEW, "--output", str(tmp_path / "run"), "--log-to", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --log-to {name} needs it: pip install {name}"
    assert not list(tmp_path.iterdir())


def test_a_folder_called_wandb_is_no_package(tmp_path, capsys, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as it leaves behind
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert train.main([*FEW, "--output", str(tmp_path / "run"), "--log-to", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
