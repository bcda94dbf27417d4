"""Commands run in this process, and a trained model to run them on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from typer.testing import CliRunner, Result

from lunet_fast.cli import app
from lunet_fast.recsys.data.ratings import from_frame
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.recsys.synthetic import latent_frame, quick_config

FORMULA = "=HYPERLINK(A1)"
QUICK: dict[str, Any] = {
    name: value
    for name, value in quick_config().to_dict().items()
    if name in ("recipe", "members", "embedding_size", "epochs", "batch_size", "learning_rate")
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def squeezed(text: str) -> str:
    """Text whose lines were broken anywhere."""
    return "".join(text.replace("│", "").split())


def save_model(
    folder: Path, *, titles: bool = True, text_ids: bool = False, **settings: Any
) -> LUNetRecommender:
    """A model of users 0 to 59 and items 0 to 39, or of such texts; item 0's title looks like a formula."""
    ratings = from_frame(latent_frame(text_ids=text_ids), scale=(1, 5))
    if titles:
        names = [FORMULA, *(f"Film {n}, uncut" for n in range(1, ratings.n_items))]
        ratings = replace(ratings, item_info=pd.DataFrame({"title": names}))
    recommender = LUNetRecommender(**QUICK, **settings).fit(ratings)
    recommender.save(folder)
    return recommender
