"""Messages name options on the command line, and arguments in Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lunet_fast
from lunet_fast.cli.words import in_options
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.cli.invoke import run
from tests.recsys.synthetic import latent_frame

PACKAGE = Path(lunet_fast.__file__).parent
TWICE = latent_frame(ratings=60).iloc[[0, *range(60)]]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("gamma=0", "--gamma 0"),
        ("choose another out=FOLDER", "choose another --out FOLDER"),
        ("add resume=True to go on, overwrite=True to", "add --resume to go on, --overwrite to"),
        ("read it without: header=False", "read it without: --no-header"),
        ("mlp=False or mlp=True.", "--no-mlp or --mlp."),
        ("the right one with user=...; sep=';'", "the right one with --user-column ...; --sep ';'"),
        ("a file of texts with text=...", "a file of texts with --text-column ..."),
        ("read with rating=None)", "read with --gamma 0)"),
        ("read no times: timestamp=None", "read no times: --timestamp-column none"),
        ("transform='cube' is unknown: standard, or null", "--transform cube is unknown: standard, or none"),
        ("learning_rate=1e+06 is too high, try 2e+05", "--learning-rate 1e+06 is too high, try 2e+05"),
        ("seed=-1, gamma=0.5: both", "--seed -1, --gamma 0.5: both"),
        # Neither an argument nor one of ours.
        ("/data/seed=3/r.csv: 'epochs=3' is no id", "/data/seed=3/r.csv: 'epochs=3' is no id"),
        ("pip install 'torch>=2' nobody=3 a.seed=1", "pip install 'torch>=2' nobody=3 a.seed=1"),
    ],
)
def test_options_stand_for_arguments(said: str, told: str) -> None:
    assert in_options(said) == told


@pytest.mark.parametrize(
    ("text", "words", "python", "shell"),
    [
        ("who,item,rating\na,b,3\n", [], "with user=...", "with --user-column ..."),
        ("a,b,3\nc,d,4\n", [], "header=False", "--no-header"),
        ("user,item,rating,date\na,b,3,1/31/2020\n", [], "timestamp=None", "--timestamp-column none"),
        ("user,item\na,b\n", [], "read with rating=None", "read with --gamma 0"),
        (TWICE.to_csv(index=False), [], "duplicates='latest'", "--duplicates latest"),
        (latent_frame().assign(rating=3).to_csv(index=False), [], "with gamma=0", "with --gamma 0"),
    ],
)
def test_the_same_error_in_both_languages(
    tmp_path: Path, text: str, words: list[str], python: str, shell: str
) -> None:
    file = tmp_path / "r.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(python)) as caught:
        LUNetRecommender().fit(file)
    assert "--" not in str(caught.value)
    told = run("train", "-d", file, "-o", tmp_path / "run", *words)
    assert told.exit_code == 2
    assert shell in told.output
    assert not re.search(r"\b(user|header|rating|duplicates|gamma)=", told.output)


def test_the_library_names_no_option() -> None:
    """In what it raises; the command line's rooms aside, and those that print for it."""
    found = []
    for room in ("training", "recsys/data", "recsys/model", "recsys/measures", "recsys/serving"):
        for file in sorted((PACKAGE / room).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Raise):
                    texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
                    found += [(file.name, text) for text in texts if re.search(r"(?<!-)--[a-z]", str(text))]
    assert found == []
