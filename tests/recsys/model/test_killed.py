"""Trainings that are killed, told to stop, or lose one of several processes, by the commands a user types."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.recsys.synthetic import latent_frame

# A checkpoint at each step, so that much of the time is spent in writing them.
TRAINING = ["--epochs", "6", "--members", "2", "--batch-size", "64", "--no-mlp", "--checkpoint-minutes", "0"]


def command(data: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        start += ["--max-restarts", "2", "--monitor-interval", "0.1"]
    return [*start, "-m", "lunet_fast", "train", "-d", str(data), "-o", str(out), *TRAINING, *more]


def started(arguments: list[str], **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def finished(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    process = started(arguments)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    latent_frame(ratings=1600).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a training that nothing disturbed, and the seconds its command took."""
    out = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    done = finished(command(data, out))
    assert done.returncode == 0, done.stderr
    return out, time.monotonic() - began


def result(out: Path) -> tuple[bytes, dict[str, object]]:
    values = json.loads((out / "metrics.json").read_text())
    del values["train_seconds"]
    return (out / "model.safetensors").read_bytes(), values


def survive(data: Path, whole: tuple[Path, float], tmp_path: Path, kills: int, seed: int) -> int:
    """Kill trainings ``kills`` times at random moments, resume each to its end, compare; how many kills left
    a file half written."""
    expected, seconds = result(whole[0]), whole[1]
    rng = random.Random(seed)
    killed = half_written = run = 0
    while killed < kills:
        out = tmp_path / f"run-{run}"
        run += 1
        while not (out / "metrics.json").exists():
            process = started(command(data, out, "--resume"))
            try:
                _, stderr = process.communicate(
                    timeout=rng.uniform(0.3, 1.0) * seconds if killed < kills else 300
                )
                assert process.returncode == 0, stderr
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                half_written += any(out.rglob(".lunet-fast-*"))
        assert result(out) == expected
        assert not list(out.rglob(".lunet-fast-*"))
    return half_written


def test_a_killed_training_ends_with_the_same_bytes(
    data: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    survive(data, whole, tmp_path, kills=1, seed=0)


@pytest.mark.slow
def test_thirty_kills(data: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    assert survive(data, whole, tmp_path, kills=30, seed=1) >= 1


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_a_signal_saves_and_says_so(
    data: Path, whole: tuple[Path, float], tmp_path: Path, number: int, code: int
) -> None:
    process = started(command(data, tmp_path, "--checkpoint-minutes", "60"))
    while not (tmp_path / "checkpoints" / "lu-net.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Interrupted." in stderr
    assert "lu-net.safetensors holds the training up to epoch" in stderr
    assert "Traceback" not in stderr
    done = finished(command(data, tmp_path, "--resume"))
    assert done.returncode == 0, done.stderr
    assert result(tmp_path) == result(whole[0])
    again = finished(command(data, tmp_path, "--resume"))
    assert again.returncode == 0
    assert "finished training; nothing to do" in again.stdout


class TestTwoProcesses:
    """``torchrun`` with gloo."""

    def test_are_one_training(self, data: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
        done = finished(command(data, tmp_path, processes=2))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 6/6") == 1  # one of them speaks
        (_, one), (_, two) = result(whole[0]), result(tmp_path)
        assert (two["world_size"], two["global_batch"]) == (2, 64)
        assert two["test_mse"] == pytest.approx(one["test_mse"], rel=1e-5)
        first, second = (load_file(folder / "model.safetensors") for folder in (whole[0], tmp_path))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-4)

    @pytest.mark.slow
    def test_a_killed_worker_is_started_again(
        self, data: Path, whole: tuple[Path, float], tmp_path: Path
    ) -> None:
        """torchrun ends the others and starts all anew, which resume; later one process goes on alone."""
        out = tmp_path / "run"
        process = started(command(data, out, "--resume", processes=2))
        while not (out / "checkpoints" / "lu-net.safetensors").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert "SIGKILL" in stderr or "exitcode: -9" in stderr
        assert result(out)[1]["test_mse"] == pytest.approx(result(whole[0])[1]["test_mse"], rel=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
    def test_another_number_resumes(
        self, data: Path, whole: tuple[Path, float], tmp_path: Path, first: int, then: int
    ) -> None:
        process = started(command(data, tmp_path, processes=first))
        while not (tmp_path / "checkpoints" / "lu-net.safetensors").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert not (tmp_path / "metrics.json").exists()
        done = finished(command(data, tmp_path, "--resume", processes=then))
        assert done.returncode == 0, done.stderr
        values = result(tmp_path)[1]
        assert values["world_size"] == then
        assert values["test_mse"] == pytest.approx(result(whole[0])[1]["test_mse"], rel=1e-5)


def _may_make_namespaces() -> bool:
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "lunet-probe"], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", "lunet-probe"]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _may_make_namespaces(), reason="network namespaces cannot be made here")
def test_two_hosts(data: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    """Two network namespaces with a cable between them, a torchrun in each; they share no run folder."""
    hosts = [("lunet-a", "10.77.0.1"), ("lunet-b", "10.77.0.2")]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name, _ in hosts:
            ip("netns", "add", name)
        ip("link", "add", "lunet-v0", "type", "veth", "peer", "name", "lunet-v1")
        runs = []
        for place, (name, address) in enumerate(hosts):
            cable = f"lunet-v{place}"
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        for place, (name, address) in enumerate(hosts):
            torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0][1]}:29555"]
            torchrun += ["--rdzv-conf", f"is_host={1 - place}", "--local-addr", address]
            training = command(data, tmp_path / name)[1:]
            inside = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME=lunet-v{place}"]
            runs.append(started([*inside, sys.executable, *torchrun, *training]))
        for process in runs:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
    finally:
        for name, _ in hosts:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
    assert not (tmp_path / "lunet-b").exists()
    values = result(tmp_path / "lunet-a")[1]
    assert values["world_size"] == 2
    assert values["test_mse"] == pytest.approx(result(whole[0])[1]["test_mse"], rel=1e-5)
