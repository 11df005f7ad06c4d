from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from broker.messages import Network, Parameters
from broker.training_messages import Round
from coordinator.errors import ResumeError
from tensors.errors import DataError
from tests.fake_coordinator import Harness, inference_report, only
from tests.server_side import (
    make_activations,
)
from tests.tiny import NETWORK, assert_same


def test_a_restarted_coordinator_raises_the_attempt_and_starts_from_the_last_closed_round() -> None:
    first = Harness(min_devices=2, rounds=3)
    first.join("a", 2)
    first.join("b", 5)
    first.train("a", "b")
    first.send("a", 0, 1)
    interrupted = first.round
    assert (interrupted.round, interrupted.attempt) == (2, 0)
    kept = first.checkpoint().model.state

    second = Harness(first.folder, min_devices=2, rounds=3)
    assert second.round.phase == "gathering"
    assert second.round.run == interrupted.run
    assert second.round.version == interrupted.version
    assert_same(second.checkpoint().model.state, kept)
    said = second.join("a", 2) + second.join("b", 5)
    announced = only(Round, said)
    assert (announced.round, announced.attempt, announced.version) == (2, 1, 1)
    second.hear("a", make_activations(interrupted.stamp, 2, cut=2, version=1))
    assert second.observer.discarded == {"stale_attempt": 1}
    second.train("a", "b")
    assert second.checkpoint().version == 2

    third = Harness(first.folder, min_devices=2, rounds=3)
    said = third.join("a", 2) + third.join("b", 5)
    assert only(Round, said).stamp == (announced.run, 3, 1)


def test_who_watches_is_told_how_it_is_before_anything_happens() -> None:
    first = Harness(min_devices=2, rounds=3)
    assert first.observer.phases == ["gathering"]
    assert first.observer.known == {}
    first.join("a", 2)
    first.join("b", 5)
    first.train("a", "b")
    second = Harness(first.folder, min_devices=2, rounds=3)
    assert second.observer.phases == ["gathering"]
    assert second.observer.states == {"offline": 2}
    assert (second.observer.known["round"], second.observer.known["version"]) == (1, 1)


@pytest.mark.parametrize("codec", ["fp32", "int8+zstd"])
def test_the_result_of_a_repeated_attempt_is_that_of_an_undisturbed_one(codec: str) -> None:
    calm, restarted = (Harness(rounds=2, parameter_codec=codec) for _ in range(2))
    calm.join("a", 2)
    calm.train("a")
    undisturbed = calm.train("a")
    restarted.join("a", 2)
    restarted.train("a")
    restarted.send("a", 0, 1)
    restarted = Harness(restarted.folder, rounds=2, parameter_codec=codec)
    restarted.join("a", 2)
    repeated = restarted.train("a")
    sent, as_before = only(Parameters, repeated), only(Parameters, undisturbed)
    assert (sent.base, sent.state) == (as_before.base, as_before.state)
    one, other = restarted.checkpoint(), calm.checkpoint()
    assert_same(one.model.state, other.model.state)
    assert_same(one.model.momentum, other.model.momentum)
    assert_same(one.residual, other.residual)
    assert bool(one.residual) is (codec != "fp32")


def test_after_a_restart_known_devices_are_waited_for_but_not_for_ever() -> None:
    first = Harness(min_devices=2, rounds=3, quorum=0.5)
    first.join("a", 2)
    first.join("b", 5)
    first.train("a", "b")
    second = Harness(first.folder, min_devices=2, rounds=3, quorum=0.5, return_wait_s=15)
    second.online("a")
    assert second.round.phase == "gathering"
    second.cuts = first.cuts
    second.wait(14)
    assert second.round.phase == "gathering"
    second.wait(2)
    assert second.round.phase == "training"
    second.train("a")
    assert second.checkpoint().version == 2


def test_after_a_restart_without_any_device_it_waits_in_peace() -> None:
    first = Harness()
    first.join("a", 2)
    first.train("a")
    second = Harness(first.folder)
    second.wait(1000)
    second.online("a")
    assert second.round.phase == "training"


def test_what_devices_did_before_a_restart_is_remembered() -> None:
    first = Harness(rounds=2)
    first.join("a", 2, samples=64)
    first.train("a")
    second = Harness(first.folder, rounds=2)
    second.join("a", 2)
    second.train("a")
    (device,) = second.checkpoint().registry
    assert (device["name"], device["rounds"], device["samples"]) == ("a", 2, 48)
    assert len(second.checkpoint().history) == 2
    assert second.checkpoint().traffic == {"up/activation/a": 14}


def test_another_configuration_does_not_resume() -> None:
    first = Harness()
    with pytest.raises(ResumeError, match=r"strategy = 'averaging'.*'sequential'.*--fresh"):
        Harness(first.folder, strategy="sequential")


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        (NETWORK, r"images of fashion-mnist-small are 1×28×28 .* takes 1×8×8"),
        (NETWORK.model_copy(update={"size": 28}), "10 classes, the network 4"),
    ],
)
def test_held_out_images_that_do_not_fit_the_network(network: Network, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        Harness(network=network, dataset="fashion-mnist-small")


def test_held_out_pictures_of_a_folder_are_brought_to_the_networks_size(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 30)).save(folder / "1.png")
    network = NETWORK.model_copy(update={"channels": 3, "size": 16})
    server = Harness(network=network, dataset=f"image-folder:{tmp_path / 'pictures'}", rounds=1)
    assert server.round.phase == "gathering"


def test_fresh_starts_over_and_keeps_the_old_run() -> None:
    first = Harness()
    first.join("a", 2)
    first.train("a")
    second = Harness(first.folder, fresh=True, strategy="sequential")
    assert second.round.run != first.round.run
    assert second.round.version == 0
    assert second.checkpoint().round == 0
    assert len([p for p in first.folder.iterdir() if p.is_dir()]) == 2


def test_a_restart_after_the_last_round_goes_on_with_the_inference() -> None:
    first = Harness(rounds=1, inference=True)
    first.join("a", 2, test_samples=4)
    first.train("a")
    second = Harness(first.folder, rounds=1, inference=True)
    assert second.round.phase == "inference"
    second.online("a")
    second.wait(60)
    second.hear("a", inference_report(second))
    assert second.core.finished


def test_a_run_that_has_its_result_is_not_measured_again() -> None:
    server = Harness(rounds=1, inference=True)
    server.join("a", 2, test_samples=4)
    server.train("a")
    server.hear("a", inference_report(server))
    assert server.core.finished
    (path,) = server.folder.glob("*/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"left": "alone"}))

    again = Harness(server.folder, rounds=1, inference=True)
    again.wait(1)
    assert again.core.finished
    assert "left" in json.loads(path.read_text())

    path.write_text("torn")
    torn = Harness(server.folder, rounds=1, inference=True)
    torn.wait(1)
    assert not torn.core.finished
