"""What a command loads before it does anything, shell completion, and where options come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from lunet_fast import __main__ as entry
from lunet_fast import doctor
from lunet_fast.cli import app
from lunet_fast.density.config import DensityConfig
from lunet_fast.layers.lunet import PERMUTATIONS, SIGNS
from lunet_fast.recsys.model.config import TrainConfig
from tests.cli.invoke import run, squeezed

HEAVY = ("torch", "numpy", "pandas", "matplotlib", "pydantic")


def loaded_by(program: str) -> list[str]:
    """Which of the slow packages a new process has loaded at the end of the program."""
    program = f"import sys\n{program}\nprint(*sorted({set(HEAVY)!r} & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


def commands(command: Any, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command and group, by the words that call it."""
    found = {words: command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= commands(inner, (*words, name))
    return found


EVERY = commands(typer.main.get_command(app))


class TestStart:
    @pytest.mark.parametrize("option", ["--help", "--version"])
    def test_loads_nothing_heavy(self, option: str) -> None:
        program = f"from lunet_fast.cli import app\ntry:\n    app([{option!r}])\nexcept SystemExit:\n    pass"
        assert loaded_by(program) == []

    def test_no_help_loads_torch(self) -> None:
        lines = [f"from lunet_fast.cli import app\nfor words in {sorted(EVERY)!r}:"]
        lines += ["    try:\n        app([*words, '--help'])\n    except SystemExit:\n        pass"]
        assert loaded_by("\n".join(lines)) == ["pydantic"]

    def test_what_the_command_needs_is_the_extra(self) -> None:
        brought_by_others = {"filelock", "markdown-it-py"}  # torch and rich
        assert set(entry._NEEDED) == set(doctor.EXTRAS["train"]) - brought_by_others


class TestCompletion:
    @staticmethod
    def completed(*words: str) -> list[str]:
        environment = {
            **os.environ,
            "_LUNET_FAST_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("lunet-fast", *words)),
            "COMP_CWORD": str(len(words)),
        }
        command = [sys.executable, "-m", "lunet_fast"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        return done.stdout.split()

    def test_commands_and_options(self) -> None:
        assert self.completed("re") == ["recommend", "reproduce"]
        assert self.completed("density", "s") == ["sample"]
        assert self.completed("train", "--lay") == ["--layers"]
        assert "--device" in self.completed("evaluate", "--d")

    def test_can_be_installed(self) -> None:
        text = squeezed(run("--help").output)
        assert "--install-completion" in text
        assert "--show-completion" in text


class TestOptions:
    @pytest.mark.parametrize(
        "words", [w for w, c in EVERY.items() if not hasattr(c, "commands")], ids=" ".join
    )
    def test_every_command_is_explained(self, words: tuple[str, ...]) -> None:
        result = run(*words, "--help")
        assert result.exit_code == 0
        assert f"lunet-fast {' '.join(words)}" in result.output  # an example
        context = typer.Context(EVERY[words])
        for option in EVERY[words].get_params(context):
            assert option.help or getattr(option, "metavar", None), option.name

    @pytest.mark.parametrize(
        ("words", "config"), [(("train",), TrainConfig), (("density", "train"), DensityConfig)]
    )
    def test_settings_are_the_declared_ones(self, words: tuple[str, ...], config: Any) -> None:
        command = EVERY[words]
        options = {option.name: option for option in command.get_params(typer.Context(command))}
        shared = options.keys() & config.model_fields.keys() - {"recipe", "split"}
        assert len(shared) > 10
        for name in shared:
            field = config.model_fields[name]
            assert options[name].help == field.description.replace("``", "`").replace("\n", " ")
            assert options[name].default is None

    def test_choices_are_those_of_the_layers(self) -> None:
        fields = DensityConfig.model_fields
        permutation, none = get_args(fields["permutation"].annotation)
        assert (get_args(permutation), none) == (PERMUTATIONS, type(None))
        assert get_args(fields["signs"].annotation) == SIGNS

    @pytest.mark.parametrize(
        ("words", "settings", "message"),
        [
            ("train", {"layers": 10**9}, "--layers 1000000000 must be a whole number from 1 to 1000"),
            (
                "train",
                {"embedding_size": 10**12},
                "--embedding-size 1000000000000 must be a whole number from 1 to",
            ),
            ("train", {"members": 10**9}, "--members 1000000000 must be a whole number from 1 to 1000"),
            ("density train", {"layers": 10**9}, "--layers 1000000000 must be a whole number from 1 to 1000"),
            (
                "density train",
                {"components": 4 * 10**8},
                "--components 400000000 must be a whole number from 1 to",
            ),
        ],
    )
    def test_bounds_are_told_before_anything_is_read(
        self, words: str, settings: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        given = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        result = run(*words.split(), "--dataset", "nothing", "--out", tmp_path / "run", *given)
        assert (result.exit_code, message in result.output) == (2, True), result.output
        if words == "train":
            (tmp_path / "s.json").write_text(json.dumps(settings))
            result = run("train", "-d", "nothing", "-o", tmp_path / "run", "--settings", tmp_path / "s.json")
            assert (result.exit_code, message in result.output) == (2, True), result.output

    def test_none_is_a_choice_where_a_setting_may_be_absent(self) -> None:
        result = run("density", "train", "--dataset", "nothing", "--permutation", "none")
        assert "neither a known data set" in result.output
        result = run("density", "train", "--dataset", "nothing", "--permutation", "sideways")
        assert "--permutation sideways is unknown: choose one of reverse, random, or none" in result.output
