"""What our pages tell people to type: every program takes it, and says --help without starting its work."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in ROOT.rglob("*.md") if ".venv" not in path.parts)
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in (".", "baselines", "experiments", "integrations", "gpu", "hallucination")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
TYPED = re.compile(r"\bpython (?:-m )?([a-z_][\w./]*)([^\n`#&|>]*)")


class Accepted(BaseException):
    """The command line was read: what follows would be the work itself."""


def commands():
    """(page, program, arguments) of all commands in the pages that leave nothing to be filled in."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.M):
            text = text.replace(f"${name}", value)
        for program, rest in TYPED.findall(text):
            if not re.search(r"\.\.\.|…|\b[A-Z]{2,}\b", rest):
                module = program.removesuffix(".py").replace("/", ".")
                found.append((str(page.relative_to(ROOT)), module, shlex.split(rest)))
    return found


@pytest.fixture
def only_read(monkeypatch):
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def program(name):
    """Its `main`; skips where what it needs is not installed."""
    try:
        return importlib.import_module(name).main
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in {"trl", "matplotlib", "peft", "gguf"}:
            pytest.skip(f"{error.name} is not installed")
        raise


@pytest.mark.parametrize(("page", "name", "arguments"), commands())
def test_every_command_in_the_pages_is_one_that_its_program_takes(only_read, page, name, arguments):
    with pytest.raises(Accepted):
        program(name)(arguments)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_says_how_it_is_called_and_does_nothing_else(name, capsys):
    with pytest.raises(SystemExit) as ended:
        program(name)(["--help"])
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
