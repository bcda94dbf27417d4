from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from lunet_fast import doctor
from lunet_fast.doctor import Finding, examine
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.layers.lunet import LUNet
from tests.cli.invoke import run

PROJECT = (Path(__file__).parent.parent / "pyproject.toml").read_text()


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("LUNET_FAST_DATA", raising=False)
    monkeypatch.setenv("LUNET_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def found(name: str) -> Finding:
    return next(finding for finding in examine() if finding.name == name)


def test_a_whole_installation() -> None:
    state = torch.random.get_rng_state()
    findings = examine()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [f for f in findings if f.state == "broken"] == []
    states = {f.name: f.state for f in findings}
    for name in (
        "torch",
        "numpy",
        "train",
        "cpu",
        "backend",
        "inverse, float64",
        "log|det J|, float64",
        "cache",
    ):
        assert states[name] == "ok", name
    assert (states["ml-100k"], states["ml-1m"]) == ("absent", "absent")


def test_extras_are_those_of_the_project() -> None:
    section = PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    for_users = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE)) - {"dev", "docs", "fuzz"}
    assert for_users == set(doctor.EXTRAS)
    for extra, names in doctor.EXTRAS.items():
        listed = re.search(rf"^{extra} = \[(.*?)^\]", PROJECT, re.DOTALL | re.MULTILINE)
        assert listed is not None
        required = re.findall(r'"([a-z0-9-]+)(?:[><=].*)?"', listed[1])
        assert set(required) == set(names)


class TestChecks:
    def test_a_wrong_inverse_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inverse = LUNet.inverse
        monkeypatch.setattr(LUNet, "inverse", lambda net, y: inverse(net, y) + 1e-2)
        for name in ("inverse, float64", "float32 on cpu"):
            finding = found(name)
            assert (finding.state, finding.fix != "") == ("broken", True)
            assert "largest error" in finding.text

    def test_a_wrong_determinant_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        both = LUNet.forward_and_logabsdet

        def wrong(net: LUNet, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y, logabsdet = both(net, x)
            return y, logabsdet * torch.nan

        monkeypatch.setattr(LUNet, "forward_and_logabsdet", wrong)
        assert found("log|det J|, float64").state == "broken"

    def test_a_crash_is_a_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def crash(*_: object, **__: object) -> None:
            raise RuntimeError("no kernel image\nis available")

        monkeypatch.setattr(LUNet, "_run", crash)
        assert found("inverse, float64").text == "RuntimeError: no kernel image"
        result = run("doctor")
        assert result.exit_code == 1
        assert "3 broken: inverse, float64, log|det J|, float64, float32 on cpu" in result.stdout

    def test_the_net_is_not_a_trivial_one(self) -> None:
        net = doctor._net()
        for layer in net.layers:
            assert isinstance(layer, LUDense)
            assert (layer.weight - torch.eye(16)).abs().max() > 0.1


class TestPackages:
    def test_missing_extras_are_not_broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find, absent = importlib.util.find_spec, ("zuko", "pooch", "pyarrow", "triton")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
        findings = {finding.name: finding for finding in examine()}
        assert findings["bench"] == Finding(
            "extras", "bench", "absent", "without zuko", "pip install 'lunet-fast[bench]'"
        )
        assert findings["train"].fix == "pip install 'lunet-fast[train]'"
        assert findings["parquet"].fix == "pip install 'lunet-fast[parquet]'"
        assert findings["triton"].state == "absent"
        assert run("doctor").exit_code == 0

    def test_a_package_that_cannot_be_imported_is_broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        assert found("safetensors").state == "broken"


class TestData:
    def test_cache_that_cannot_be_written(self, no_data: Path) -> None:
        no_data.write_text("a file where the folder should be")
        finding = found("cache")
        assert finding.state == "broken"
        assert "LUNET_FAST_CACHE" in finding.fix

    def test_cache_is_not_made(self, no_data: Path) -> None:
        assert found("cache").text == f"{no_data} can be made"
        assert not no_data.exists()
        no_data.mkdir()
        assert found("cache").text == f"{no_data} can be written"
        assert list(no_data.iterdir()) == []

    def test_damaged_data(self, no_data: Path) -> None:
        no_data.mkdir()
        (no_data / "ml-100k.zip").write_bytes(b"no zip")
        finding = found("ml-100k")
        assert finding.state == "broken"
        assert "not a zip file" in finding.text
        assert (no_data / "ml-100k.zip").exists()


def test_json() -> None:
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (0, True)
    assert {"section", "name", "state", "text", "fix"} == set(report["findings"][0])
