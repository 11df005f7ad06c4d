"""Whole runs on the in-memory broker: everything but the sockets and the processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.memory import MemoryBroker
from broker.training_messages import Report
from coordinator.aggregation import half_of
from edge_agent.snapshots import DiskSnapshots
from ops.report import summarize
from tensors.rate import TOLERANCE
from tests.fleet_in_process import Fleet, Watcher, in_memory
from tests.tiny import assert_same, make_device_data

DEVICES = {"a": 2, "b": 3, "c": 5}
QUOTA = 4
ROUNDS = 2
LABELS = pytest.mark.parametrize("labels", ["server", "device"])


def make_fleet(folder: Path, broker: MemoryBroker, **settings: Any) -> Fleet:
    fields: dict[str, Any] = {
        "codec": "int8+zstd",
        "window": 2,
        "rounds": ROUNDS,
        "batches_per_round": QUOTA,
        "inference": True,
        "threshold": 0.5,
    }
    return Fleet(
        folder,
        in_memory(broker),
        DEVICES,
        lambda name: make_device_data(48, seed=ord(name), tests=10),
        **(fields | settings),
    )


def account(report: Report) -> dict[str, Any]:
    return {
        "produced": report.produced,
        "applied": report.applied,
        "discarded": report.discarded,
        "expired": report.expired,
    }


def assert_books_balance(history: list[dict[str, Any]], watcher: Watcher, *, calm: bool) -> None:
    """Per round and device, and both ends agree on what was applied."""
    assert [record["round"] for record in history] == list(range(1, ROUNDS + 1))
    for record in history:
        assert record["devices"].keys() == DEVICES.keys()
        for name, entry in record["devices"].items():
            books = entry["account"]
            report = watcher.reports[name, record["round"], record["attempt"]]
            for each in (books, account(report)):
                assert each["produced"] == (
                    each["applied"] + sum(each["discarded"].values()) + each["expired"]
                )
            assert books == account(report), name
            assert entry["samples"] == 8 * books["applied"]
            assert entry["finished"]
            if calm:
                assert books == {
                    "produced": QUOTA,
                    "applied": QUOTA,
                    "discarded": {},
                    "expired": 0,
                }


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
@pytest.mark.parametrize("feedback", ["gradient", "none"])
@LABELS
async def test_a_run_from_the_first_hello_to_the_result(
    tmp_path: Path, strategy: str, feedback: str, labels: str
) -> None:
    fleet = make_fleet(
        tmp_path, MemoryBroker(), strategy=strategy, feedback=feedback, labels=labels
    )
    fleet.start()
    result = await fleet.finish()

    assert_books_balance(result["history"], fleet.watcher, calm=True)
    assert len(fleet.watcher.losses) == ROUNDS * len(DEVICES) * QUOTA
    assert not fleet.watcher.discarded
    assert (result["rounds"], result["version"]) == (ROUNDS, ROUNDS)
    assert result["settings"]["strategy"] == strategy
    assert [(d["device"], d["cut"]) for d in result["devices"]] == list(DEVICES.items())
    for device in result["devices"]:
        assert device["rounds"] == ROUNDS
        assert device["samples"] == 8 * ROUNDS * QUOTA
        inference = device["inference"]
        assert inference["images"] == 10 == inference["exits"] + inference["offloads"]
        assert inference["offloads"] == (
            inference["answered"] + inference["refused"] + inference["timeouts"]
        )
        assert inference["refused"] == inference["timeouts"] == 0
    for by, account in (("exit", "exits"), ("server", "answered")):
        images = sum(device["inference"][account] for device in result["devices"])
        assert fleet.watcher.gained["predictions", by] == images
    for name in DEVICES:
        traffic = result["traffic"]
        assert traffic[f"up/activation/{name}"] > 0
        assert traffic[f"up/parameter/{name}"] > 0
        assert (f"down/gradient/{name}" in traffic) is (feedback == "gradient")
        assert (f"up/gradient/{name}" in traffic) is (labels == "device")
    checkpoint = fleet.checkpoint()
    assert checkpoint.trained_cuts == sorted(DEVICES.values())
    assert all(np.isfinite(values).all() for values in checkpoint.model.state.values())


@pytest.mark.parametrize("strategy", ["averaging", "cascade"])
async def test_an_honest_fleet_with_all_defences_on(tmp_path: Path, strategy: str) -> None:
    fleet = make_fleet(
        tmp_path,
        MemoryBroker(),
        strategy=strategy,
        aggregation_rule="trimmed-mean",
        upload_clip=5.0,
        gradient_clip=5.0,
        loss_mads=20.0,
    )
    fleet.start()
    result = await fleet.finish()
    assert_books_balance(result["history"], fleet.watcher, calm=True)
    assert not fleet.watcher.discarded
    checkpoint = fleet.checkpoint()
    assert all(np.isfinite(values).all() for values in checkpoint.model.state.values())
    assert not list((tmp_path / "coordinator").glob("tmp*"))


async def test_a_device_without_a_cut_measures_itself_and_is_given_one(tmp_path: Path) -> None:
    fleet = Fleet(
        tmp_path,
        in_memory(MemoryBroker()),
        {"a": "auto", "b": 2},
        lambda name: make_device_data(48, seed=ord(name)),
        rounds=1,
        step_budget_ms=1e6,
    )
    fleet.start()
    result = await fleet.finish()
    assert [(d["device"], d["cut"], d["rounds"]) for d in result["devices"]] == [
        ("a", 9, 1),
        ("b", 2, 1),
    ]


@pytest.mark.parametrize("parameter_codec", ["fp32", "int8+zstd"])
async def test_training_learns(tmp_path: Path, parameter_codec: str) -> None:
    fleet = make_fleet(
        tmp_path,
        MemoryBroker(),
        rounds=6,
        batches_per_round=8,
        inference=False,
        parameter_codec=parameter_codec,
    )
    fleet.start()
    result = await fleet.finish()
    first, last = (np.mean(list(r["train_loss"].values())) for r in result["history"][::5])
    assert last < 0.7 * first


async def test_activations_and_gradients_keep_to_their_bytes_per_sample(tmp_path: Path) -> None:
    budget = 90.0
    fleet = make_fleet(tmp_path, MemoryBroker(), rounds=3, bytes_per_sample=budget)
    fleet.start()
    result = await fleet.finish()
    summary = summarize(result, wall_seconds=1.0)
    assert 0.6 * budget < summary["bytes_up_per_sample"] <= budget * (1 + TOLERANCE)
    for device in summary["devices"]:
        traffic, samples = result["traffic"], device["samples"]
        assert traffic[f"up/activation/{device['device']}"] <= samples * budget * (1 + TOLERANCE)
        # A gradient's budget does not count the message around it.
        around = 200 / 8
        down = traffic[f"down/gradient/{device['device']}"] / samples
        assert down <= budget * (1 + TOLERANCE) + around
        assert 3 <= device["activation_levels"] < 256
        values = {2: 256, 3: 256, 5: 128}[device["cut"]]
        assert 1 < device["activation_bits"] < 8 * budget / values


@LABELS
async def test_a_restarted_coordinator_goes_on_with_a_raised_attempt(
    tmp_path: Path, labels: str
) -> None:
    broker = MemoryBroker()
    fleet = make_fleet(tmp_path, broker, labels=labels, batches_per_round=QUOTA)
    fleet.start()
    await fleet.watcher.applied(len(DEVICES) * QUOTA + 2)
    await fleet.kill("coordinator")
    fleet.start_coordinator()
    result = await fleet.finish()
    assert [record["attempt"] for record in result["history"]] == [0, 1]
    assert_books_balance(result["history"], fleet.watcher, calm=False)
    for record in result["history"]:
        for entry in record["devices"].values():
            assert entry["account"]["applied"] == QUOTA
    for (_, _, attempt), report in fleet.watcher.reports.items():
        books = account(report)
        assert books["produced"] == (
            books["applied"] + sum(books["discarded"].values()) + books["expired"]
        ), attempt


@LABELS
async def test_a_device_cut_off_in_the_middle_of_a_round_comes_back(
    tmp_path: Path, labels: str
) -> None:
    broker = MemoryBroker()
    fleet = make_fleet(tmp_path, broker, labels=labels)
    fleet.start()
    for batches in (2, 6, 11, 15):
        await fleet.watcher.applied(batches)
        broker.disconnect("b")
    result = await fleet.finish()
    assert_books_balance(result["history"], fleet.watcher, calm=False)
    assert len(fleet.watcher.losses) == ROUNDS * len(DEVICES) * QUOTA, "none twice, none lost"


@LABELS
async def test_a_coordinator_cut_off_in_the_middle_of_a_round_comes_back(
    tmp_path: Path, labels: str
) -> None:
    broker = MemoryBroker()
    fleet = make_fleet(tmp_path, broker, labels=labels)
    fleet.start()
    for batches in (3, 14):
        await fleet.watcher.applied(batches)
        broker.disconnect("coordinator")
    result = await fleet.finish()
    assert [record["attempt"] for record in result["history"]] == [0, 0]
    assert_books_balance(result["history"], fleet.watcher, calm=False)
    assert all(report.timeouts == 0 for report in fleet.watcher.reports.values())


@LABELS
async def test_a_killed_device_goes_on_where_the_coordinator_saw_it_last(
    tmp_path: Path, labels: str
) -> None:
    broker = MemoryBroker()
    fleet = make_fleet(tmp_path, broker, labels=labels)
    fleet.start()
    await fleet.watcher.applied(4)
    await fleet.kill("c")
    fleet.start_agent("c")
    result = await fleet.finish()
    assert_books_balance(result["history"], fleet.watcher, calm=False)
    assert len(fleet.watcher.losses) <= ROUNDS * len(DEVICES) * QUOTA


@LABELS
async def test_a_broker_that_goes_away_and_comes_back(tmp_path: Path, labels: str) -> None:
    broker = MemoryBroker()
    fleet = make_fleet(tmp_path, broker, labels=labels)
    fleet.start()
    await fleet.watcher.applied(5)
    broker.stop()
    broker.start()
    result = await fleet.finish()
    assert_books_balance(result["history"], fleet.watcher, calm=False)


async def test_the_result_with_held_out_images_has_scores(tmp_path: Path) -> None:
    from broker.messages import Network
    from edge_agent.data import load_device_data
    from edge_agent.settings import AgentSettings

    def data(name: str) -> Any:
        share = list(DEVICES).index(name)
        return load_device_data(AgentSettings(device=name, share=share, shares=200))

    fleet = Fleet(
        tmp_path,
        in_memory(MemoryBroker()),
        DEVICES,
        data,
        network=Network(width=4, channels=1, size=28, head="linear"),
        dataset="fashion-mnist-small",
        codec="int8+zstd",
        rounds=1,
        batches_per_round=2,
        inference=True,
    )
    fleet.start()
    result = await fleet.finish()
    (record,) = result["history"]
    assert 0 <= record["server_accuracy"] <= 1
    assert record["exit_accuracy"].keys() == {"2", "3", "5"}
    for device in result["devices"]:
        sweep = device["exit_sweep"]
        assert [point["threshold"] for point in sweep] == sorted(p["threshold"] for p in sweep)
        assert 0 <= device["exit_accuracy"] <= 1
        assert sweep[-1]["exit_rate"] <= sweep[0]["exit_rate"]
        assert device["inference"]["images"] == 10


class Interference:
    """Loses some of what is broadcast; knows who was told what in person."""

    def __init__(self, *lose: tuple[str, str]) -> None:
        self.answered: list[str] = []
        self._lose = lose

    def allow(self, client: str, access: str, topic: str) -> bool:
        if access == "write" and topic.endswith("/down/parameters"):
            self.answered.append(topic.split("/")[3])
        return access == "write" or (client, topic) not in self._lose


async def test_parameters_that_go_as_differences(tmp_path: Path) -> None:
    interference = Interference()
    fleet = make_fleet(
        tmp_path, MemoryBroker(allow=interference.allow), parameter_codec="int8+zstd"
    )
    fleet.start()
    result = await fleet.finish()
    assert_books_balance(result["history"], fleet.watcher, calm=True)
    assert sorted(interference.answered) == sorted(DEVICES), "the whole went out at the start only"
    checkpoint = fleet.checkpoint()
    assert all(np.isfinite(values).all() for values in checkpoint.model.state.values())
    assert checkpoint.residual
    for name, cut in DEVICES.items():
        kept = DiskSnapshots(tmp_path / name).load(result["run"], cut)
        assert kept is not None
        version, snapshot = kept
        assert version == ROUNDS
        assert_same(snapshot.state, half_of(checkpoint.model.state, cut))
        assert snapshot.residual


async def test_a_device_that_misses_a_difference_is_given_the_whole(tmp_path: Path) -> None:
    interference = Interference(("b", "splitfleet/fleet/cut/3/parameters"))
    fleet = make_fleet(
        tmp_path, MemoryBroker(allow=interference.allow), parameter_codec="int8+zstd"
    )
    fleet.start()
    result = await fleet.finish()
    assert_books_balance(result["history"], fleet.watcher, calm=True)
    assert sorted(interference.answered) == ["a", *["b"] * (1 + ROUNDS), "c"]


@pytest.mark.parametrize("who", ["coordinator", "b"])
async def test_differences_go_on_after_a_restart(tmp_path: Path, who: str) -> None:
    interference = Interference()
    broker = MemoryBroker(allow=interference.allow)
    fleet = make_fleet(tmp_path, broker, parameter_codec="int8+zstd", rounds=3)
    fleet.start()
    await fleet.watcher.applied(len(DEVICES) * QUOTA + 2)
    await fleet.kill(who)
    if who == "coordinator":
        fleet.start_coordinator()
    else:
        fleet.start_agent(who)
    result = await fleet.finish()
    assert result["version"] == 3
    assert all(entry["finished"] for entry in result["history"][-1]["devices"].values())
    assert sorted(interference.answered) == sorted(DEVICES), "who came back held what it needed"
