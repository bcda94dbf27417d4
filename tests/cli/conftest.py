from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.cli.invoke import save_model


class Trained(NamedTuple):
    folder: Path
    recommender: LUNetRecommender


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("numbers") / "run"
    return Trained(folder, save_model(folder))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Ids are texts, and there are no titles."""
    folder = tmp_path_factory.mktemp("texts") / "run"
    return Trained(folder, save_model(folder, titles=False, text_ids=True))
