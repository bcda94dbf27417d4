from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lunet_fast.recsys.data.streaming import RatingStream
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.model_files import load_model
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.streamed_training import STREAM_SETTINGS, streamed_optimizer, train_stream
from lunet_fast.recsys.model.training import evaluate, rating_objective, rating_optimizer, train
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from lunet_fast.training.files import CheckpointError
from lunet_fast.training.loop import Interrupted, Stop
from tests.cli.invoke import run
from tests.recsys.synthetic import latent_frame, quick_config

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> RatingStream:
    path = tmp_path_factory.mktemp("stream") / "latent.parquet"
    latent_frame(ratings=1700).to_parquet(path, row_group_size=128)
    return RatingStream.open(path, buffer_rows=400)


def streamed_config(**changes: object) -> TrainConfig:
    return quick_config(**{**STREAM_SETTINGS, "epochs": 6, "dropout": 0.0, **changes})


def test_learns_what_the_training_in_memory_learns(stream: RatingStream) -> None:
    """Other batches and SparseAdam in place of Adam; the same data, model and loss."""
    config = streamed_config(epochs=12)
    values = train_stream(stream, config).metrics
    training, test = stream.in_memory()
    in_memory = train(training, config.replace(split="files"), test=test).metrics
    assert values["test_mse"] == pytest.approx(in_memory["test_mse"], rel=0.1)
    assert values["test_mse"] < 0.75 * float(test.rating.var())
    assert (values["train_ratings"], values["test_ratings"]) == (stream.n_rows, stream.n_test)
    assert 0 < values["full_hr@10"] <= 1


def test_its_gradients_are_the_dense_ones(stream: RatingStream) -> None:
    training, _ = stream.in_memory()
    sums = (stream.user_sum, stream.user_count), (stream.item_sum, stream.item_count)
    gradients = []
    for optimizer in (rating_optimizer, streamed_optimizer):
        torch.manual_seed(0)
        model = RatingModel.of_statistics(streamed_config(dropout=0.2), stream.mean, *sums)
        optimizer(model)
        batch = training.user[:100], training.item[:100], training.rating[:100]
        rating_objective(model, *batch, torch.Generator().manual_seed(1)).objective.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    dense, sparse = gradients
    for name, gradient in dense.items():
        is_table = "embedding" in name or name in ("user_bias", "item_bias")
        assert sparse[name].is_sparse == is_table
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(sparse[name].to_dense(), gradient)


def test_the_fall_back_is_that_of_all_ratings(stream: RatingStream) -> None:
    streamed = train_stream(stream, streamed_config(epochs=1)).trained.model
    training, test = stream.in_memory()
    in_memory = train(training, streamed_config(epochs=1, split="files"), test=test).trained.model
    torch.testing.assert_close(streamed.user_deviation, in_memory.user_deviation)
    torch.testing.assert_close(streamed.item_deviation, in_memory.item_deviation)
    unknown = torch.tensor([-1])
    torch.testing.assert_close(streamed(unknown, torch.tensor([3])), in_memory(unknown, torch.tensor([3])))


def test_stopped_at_each_step_it_ends_with_the_same_bytes(stream: RatingStream, tmp_path: Path) -> None:
    config = streamed_config(epochs=2, dropout=0.1, batch_size=256)
    train_stream(stream, config, out=tmp_path / "whole")
    stops = 0
    while not (tmp_path / "run" / "metrics.json").exists():
        stop = Stop()
        stop.asked = True
        try:
            train_stream(stream, config, out=tmp_path / "run", resume=True, stop=stop)
        except Interrupted:
            stops += 1
    assert stops > 8
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("setting", ["user_history", "side_features"])
def test_refuses_what_needs_every_pair(stream: RatingStream, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=True: training on a stream needs {setting}=False"):
        train_stream(stream, streamed_config(**{setting: True}))
    with pytest.raises(ValueError, match="gamma=1"):
        train_stream(stream, streamed_config(gamma=0.5))


def test_by_the_command_and_predicted_with(stream: RatingStream, tmp_path: Path) -> None:
    arguments = [
        "train",
        "-d",
        stream.source,
        "--stream",
        "--members",
        "1",
        "--epochs",
        "2",
        "-o",
        tmp_path / "run",
    ]
    told = run(*arguments)
    assert told.exit_code == 0, told.output
    assert "test MSE" in told.output
    values = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert values["split"] == "stream"
    again = run(*arguments, "--resume")
    assert (again.exit_code, "nothing to do" in again.output) == (0, True)
    recommender = LUNetRecommender.load(tmp_path / "run")
    known = float(recommender.predict([3], [5])[0])
    assert 1 <= known <= 5
    trained = load_model(tmp_path / "run" / "model.safetensors")
    assert torch.equal(trained.model.interactions.user_counts, stream.user_count)
    refused = run("evaluate", "--run", tmp_path / "run")
    assert (refused.exit_code, "a stream: give --test-file" in refused.output) == (2, True)
    wrong = run("train", "-d", "ml-100k", "--stream")
    assert (wrong.exit_code, "--stream reads Parquet files" in wrong.output) == (2, True)


def test_a_damaged_list_of_counts_is_refused(stream: RatingStream, tmp_path: Path) -> None:
    from lunet_fast.recsys.model.schema import MODEL_FORMAT
    from lunet_fast.training.files import read_tensors, write_tensors

    train_stream(stream, streamed_config(epochs=1), out=tmp_path)
    tensors, header = read_tensors(tmp_path / "model.safetensors", MODEL_FORMAT)
    state = {name: value for name, value in header.items() if name not in ("format", "version", "sha256")}
    tensors["model.interactions.user_counts"] = -tensors["model.interactions.user_counts"] - 1
    write_tensors(tmp_path / "bad.safetensors", tensors, MODEL_FORMAT, state)
    with pytest.raises(CheckpointError, match="user_counts"):
        load_model(tmp_path / "bad.safetensors")


def test_evaluation_needs_no_pairs(stream: RatingStream) -> None:
    """A streamed model is measured by the protocols of the others where somebody has the parts."""
    from lunet_fast.recsys.measures.protocols import Parts

    model = train_stream(stream, streamed_config(epochs=1)).trained.model
    training, test = stream.in_memory()
    values = evaluate(model, Parts(training, test, None, None)).metrics
    assert values["test_mse"] == pytest.approx(
        train_stream(stream, streamed_config(epochs=1)).metrics["test_mse"]
    )
