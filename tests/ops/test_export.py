from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from broker.messages import Network
from ops import export as exporting
from ops.cli import main
from ops.errors import SettingsWrong
from ops.model_file import KEY, ModelCard, read_model
from tensors.errors import ProgramError
from tensors.networks import CutNetwork, Exits, NetworkSpec, build_network, write_state
from tensors.programs import compare
from tests.serving_state import make_state, make_version

SPEC = NetworkSpec(width=4, channels=1, size=28, classes=10, head="linear")
NETWORK = Network(width=4, channels=1, size=28, classes=10, head="linear")
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 0 to 2 of a network for the bundled images; the exits at cuts 2 and 3 count."""
    root = tmp_path_factory.mktemp("state")
    make_state(root, (0.5, 0.7), spec=SPEC, network=NETWORK, dataset="fashion-mnist-small")
    return root


@pytest.fixture(scope="module")
def model_file(state_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 2 as a file, its thresholds calibrated."""
    path = tmp_path_factory.mktemp("models") / "fashion.safetensors"
    assert splitfleet("export", "--to", str(path), "--state-dir", str(state_dir)) == 0
    return path


def splitfleet(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["model", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def network_of(version: int) -> CutNetwork:
    network = build_network(SPEC)
    write_state(network, make_version(version, spec=SPEC).model.state)
    return network.eval()


def images(count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, 1, 28, 28)).astype(np.float32)


class TestModel:
    def test_answers_as_the_version_does(self, model_file: Path) -> None:
        model = read_model(model_file)
        x = torch.from_numpy(images(3))
        with torch.inference_mode():
            assert torch.equal(model.network(x), network_of(2)(x))
            for cut in (1, 2, 9):
                ours, theirs = (
                    Exits(network.device_half(cut))(x)[1]
                    for network in (model.network, network_of(2))
                )
                assert torch.equal(ours, theirs)

    def test_says_all_that_is_needed_to_answer(self, model_file: Path) -> None:
        card = read_model(model_file).card
        assert (card.run, card.version, card.score) == ("run-1", 2, 0.7)
        assert card.dataset == "fashion-mnist-small"
        assert card.classes[3] == "Dress"
        assert card.spec == SPEC
        assert (card.mean, card.std, card.exit_rule) == ((0.286,), (0.353,), "entropy")
        assert sorted(card.cuts) == [2, 3]
        for cut in card.cuts.values():
            assert cut.accuracy is not None
            assert cut.offload_rate is not None
        assert card.cut_card(2) == (2, card.cuts[2])
        assert (card.pictures.size, card.pictures.channels) == (28, 1)

    @pytest.mark.parametrize(("cut", "words"), [(None, "give --cut"), (1, "are 2, 3")])
    def test_an_exit_that_was_not_trained_is_refused(
        self, model_file: Path, cut: int | None, words: str
    ) -> None:
        with pytest.raises(SettingsWrong, match=words):
            read_model(model_file).card.cut_card(cut)

    def test_the_serving_version_is_the_default_and_thresholds_can_be_given(
        self, tmp_path: Path, capsys: Output
    ) -> None:
        state = str(tmp_path / "state")
        make_state(
            Path(state), (0.5, 0.7), spec=SPEC, network=NETWORK, dataset="fashion-mnist-small"
        )
        assert splitfleet("promote", "1", "--state-dir", state) == 0
        to = tmp_path / "m.safetensors"
        to.write_text("something older")
        told = ["--state-dir", state, "--to", str(to), "--threshold", "0.25", "--rule", "margin"]
        assert splitfleet("export", *told) == 0
        card = read_model(to).card
        assert (card.version, card.exit_rule) == (1, "margin")
        assert {cut.threshold for cut in card.cuts.values()} == {0.25}
        assert "version 1 of run-1" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "state"]


class TestThresholds:
    POLICY: ClassVar[dict[str, float]] = {"threshold": 0.4, "accuracy": 0.8, "offload_rate": 0.3}

    def export(self, tmp_path: Path, cuts: dict[str, Any], *told: str) -> ModelCard:
        """Of a version that served with these policies."""
        state = tmp_path / "state"
        store = make_state(state, (), spec=SPEC, network=NETWORK, dataset="fashion-mnist-small")
        version = make_version(1, spec=SPEC)
        version.policies = {"basis": {"exit_rule": "margin"}, "cuts": cuts}
        store.save(version)
        to = tmp_path / "m"
        assert splitfleet("export", "--to", str(to), "--state-dir", str(state), *told) == 0
        return read_model(to).card

    def test_are_those_the_version_served_with(self, tmp_path: Path) -> None:
        other = self.POLICY | {"threshold": -1.0}
        card = self.export(tmp_path, {"2": self.POLICY, "3": other})
        assert card.exit_rule == "margin"
        assert card.cuts[2].model_dump() == self.POLICY
        assert card.cuts[3].threshold == -1

    @pytest.mark.parametrize(
        ("cuts", "told"),
        [
            ({"2": POLICY}, []),
            ({"2": POLICY, "3": {"threshold": "x"}}, []),
            ({"2": POLICY, "3": POLICY}, ["--rule", "entropy"]),
            ({"2": POLICY, "3": POLICY}, ["--offload", "0.2"]),
        ],
    )
    def test_or_calibrated(self, tmp_path: Path, cuts: dict[str, Any], told: list[str]) -> None:
        card = self.export(tmp_path, cuts, *told)
        assert sorted(card.cuts) == [2, 3]
        assert card.cuts[2].threshold != 0.4
        assert card.cuts[2].accuracy is not None
        if "--offload" in told:
            assert card.exit_rule == "margin"
            assert card.cuts[2].offload_rate == pytest.approx(0.2, abs=0.05)


class TestPrograms:
    @pytest.fixture
    def half(self) -> Exits:
        return Exits(network_of(2).device_half(2)).eval()

    def test_pt2_answers_batches_of_any_size(
        self, state_dir: Path, tmp_path: Path, half: Exits, capsys: Output
    ) -> None:
        to = tmp_path / "half.pt2"
        told = ["--format", "pt2", "--cut", "2", "--threshold", "0.5", "--to", str(to)]
        assert splitfleet("export", *told, "--state-dir", str(state_dir)) == 0
        assert "differs from PyTorch by" in capsys.readouterr().out
        extra = {KEY: ""}
        program = torch.export.load(to, extra_files=extra).module()
        assert ModelCard.model_validate_json(extra[KEY]).cuts[2].threshold == 0.5
        for count in (1, 3, 32):
            x = torch.from_numpy(images(count))
            with torch.inference_mode():
                for ours, theirs in zip(half(x), program(x), strict=True):
                    torch.testing.assert_close(theirs, ours)

    def test_onnx_answers_batches_of_any_size(
        self, state_dir: Path, tmp_path: Path, half: Exits
    ) -> None:
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs splitfleet[export]")
        pytest.importorskip("onnxscript", reason="needs splitfleet[export]")
        to = tmp_path / "half.onnx"
        told = ["--format", "onnx", "--cut", "2", "--threshold", "0.5", "--to", str(to)]
        assert splitfleet("export", *told, "--state-dir", str(state_dir)) == 0
        session = onnxruntime.InferenceSession(to, providers=["CPUExecutionProvider"])
        card = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
        assert card["version"] == 2
        for count in (1, 3, 32):
            x = images(count)
            with torch.inference_mode():
                wanted = half(torch.from_numpy(x))
            found = session.run(["features", "logits"], {"images": x})
            for ours, theirs in zip(wanted, found, strict=True):
                torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)

    def test_a_program_that_answers_otherwise_is_not_written(
        self, state_dir: Path, tmp_path: Path, half: Exits, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = Exits(network_of(1).device_half(2)).eval()

        def run(x: np.ndarray) -> Any:
            with torch.inference_mode():
                return tuple(output.numpy() for output in other(torch.from_numpy(x)))

        with pytest.raises(ProgramError, match="differ from PyTorch"):
            compare(half, run, SPEC)
        with pytest.raises(ProgramError, match="have shape"):
            compare(half, lambda x: run(x[:1].repeat(9, 0)), SPEC)
        monkeypatch.setattr(exporting, "_pt2", lambda *_: b"")
        monkeypatch.setattr(exporting, "_load_pt2", lambda _: run)
        to = tmp_path / "half.pt2"
        told = ["--format", "pt2", "--cut", "2", "--threshold", "0.5", "--to", str(to)]
        assert splitfleet("export", *told, "--state-dir", str(state_dir)) == 1
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["9"], 2, "kept are 0, 1, 2"),
        (["--threshold", "1.5"], 2, "between 0 and 1"),
        (["--threshold", "nan"], 2, "between 0 and 1"),
        (["--threshold", "0.5", "--accuracy", "0.9"], 2, "leave"),
        (["--rule", "luck"], 2, "entropy"),
        (["--format", "pt2", "--threshold", "0.5"], 2, "give --cut"),
        (["--format", "pt2", "--threshold", "0.5", "--cut", "1"], 2, "trained are 2, 3"),
        (["--format", "zip"], 2, "onnx"),
        (["--dataset", "cifar10", "--data-root", "/nowhere"], 4, "cifar10"),
    ],
)
def test_what_a_user_got_wrong_is_said_and_nothing_is_written(
    state_dir: Path, tmp_path: Path, arguments: list[str], code: int, words: str, capsys: Output
) -> None:
    told = ["--to", str(tmp_path / "x"), "--state-dir", str(state_dir)]
    assert splitfleet("export", *arguments, *told) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(state_dir: Path, tmp_path: Path, capsys: Output) -> None:
    told = ["--state-dir", str(state_dir), "--threshold", "0.5", "--to"]
    assert splitfleet("export", *told, str(tmp_path)) == 2
    assert "that is a folder" in capsys.readouterr().err
    assert splitfleet("export", *told, str(tmp_path / "no" / "x")) == 5
    assert "cannot write" in capsys.readouterr().err


def test_onnx_says_what_is_missing(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    told = ["--format", "onnx", "--to", str(tmp_path / "x"), "--state-dir", str(state_dir)]
    assert splitfleet("export", *told) == 2
    assert "splitfleet[export]" in capsys.readouterr().err


def test_a_run_without_a_data_set_needs_one(tmp_path: Path, capsys: Output) -> None:
    make_state(tmp_path / "state", (0.5,))
    told = ["--state-dir", str(tmp_path / "state"), "--to", str(tmp_path / "x")]
    assert splitfleet("export", *told) == 2
    assert "give --dataset" in capsys.readouterr().err


class TestRubbish:
    """Files that are no models, or lie."""

    def rewritten(self, model_file: Path, to: Path, **changes: Any) -> Path:
        with safe_open(model_file, framework="np") as file:
            card = json.loads(file.metadata()[KEY])
        state = load_file(model_file) | changes.pop("state", {})
        save_file(state, to, metadata={KEY: json.dumps(card | changes)})
        return to

    def refusal(self, path: Path) -> str:
        with pytest.raises(SettingsWrong) as refused:
            read_model(path)
        assert str(path) in str(refused.value)
        return str(refused.value)

    def test_missing_empty_short_and_of_another_kind(
        self, model_file: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "m"
        assert "cannot be used" in self.refusal(path)
        whole = model_file.read_bytes()
        for content in (b"", b"\x89PNG" * 100, whole[:5], whole[:1000], whole[:-1], bytes(5000)):
            path.write_bytes(content)
            assert "cannot be used" in self.refusal(path)
        save_file({"x": np.zeros(3)}, path)
        assert "is no model" in self.refusal(path)
        assert "cannot be used" in self.refusal(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"format": 2}, "format"),
            ({"extra": 1}, "extra"),
            ({"classes": ["a"] * 11}, "more names"),
            ({"std": [0.0]}, "std"),
            ({"mean": [0.1, 0.2]}, "one value for each channel"),
            ({"cuts": {"2": {"threshold": None}}}, "threshold"),
            ({"cuts": {"77": {"threshold": 0.5}}}, "there is no cut 77"),
            ({"network": NETWORK.model_dump() | {"width": 4096}}, "do not fit"),
            ({"network": NETWORK.model_dump() | {"width": 10**9}}, "width"),
            ({"network": NETWORK.model_dump() | {"name": "os:getcwd"}}, "--network os:getcwd"),
            ({"state": {"blocks.9.fc.bias": np.zeros(11, np.float32)}}, "do not fit"),
            ({"state": {"more": np.zeros(11, np.float32)}}, "do not fit"),
            ({"state": {"blocks.9.fc.bias": np.full(10, np.nan, np.float32)}}, "not finite"),
        ],
    )
    def test_a_card_or_parameters_that_cannot_be(
        self, model_file: Path, tmp_path: Path, changes: dict[str, Any], words: str
    ) -> None:
        assert words in self.refusal(self.rewritten(model_file, tmp_path / "m", **changes))

    def test_an_older_card_is_still_a_model(self, model_file: Path, tmp_path: Path) -> None:
        path = self.rewritten(model_file, tmp_path / "m", score=None)
        assert read_model(path).card.score is None


def test_a_file_is_the_same_for_the_same_version(model_file: Path, state_dir: Path) -> None:
    again = model_file.with_name("again")
    assert splitfleet("export", "--to", str(again), "--state-dir", str(state_dir)) == 0
    assert again.read_bytes() == model_file.read_bytes()
