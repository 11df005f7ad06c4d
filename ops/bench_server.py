"""``splitfleet bench server``: batches one after the other, batched by cut, or in a cascade.

Eight devices at four cuts send a batch each, and the coordinator's engine trains on them: *in turn*
(strategy ``sequential``), *equal cuts* (the two batches of a cut in one step) or *cascade* (as many
in one step as that strategy takes). Compared are the engine's samples per second, the ways by turns
in the same minutes, and the accuracy after equally many samples, with the same first weights, split
and batches for every way of one seed.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console

from coordinator.aggregation import Aggregation, Model, block_of, half_of
from coordinator.cascade import RATE_RULES, TOGETHER, Cascade, RateRule
from coordinator.engines import Sequential
from coordinator.evaluation import Evaluator
from coordinator.rounds import learning_rate
from coordinator.server_copy import Entry, Step
from edge_agent.trainer import DeviceTrainer
from ops import bench_rows, rate_accuracy
from ops.errors import SettingsWrong
from ops.paired import difference
from ops.units import MISSING
from tensors.batches import BatchStream
from tensors.datasets import Dataset
from tensors.networks import CutNetwork, NetworkSpec, build_network, read_state
from tensors.partition import partition
from tensors.training import Compute, MemoryFormat, Precision, choose_compute

CUTS = (2, 3, 4, 5, 2, 3, 4, 5)
"""One device each."""
BATCH = 16
RATE, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
WAYS = ("in turn", "equal cuts", "cascade")
BASELINE = WAYS[0]

Row = dict[str, Any]
Serve = Callable[[Sequence[Entry]], list[Step]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What every measurement has in common.

    ``cuts``: one for each device. ``together``: the most batches in one step of a cascade.
    """

    train_images: int = 4000
    rounds: int = 4
    cuts: tuple[int, ...] = CUTS
    together: int = TOGETHER
    rate_rule: RateRule = "momentum"
    dataset: str = "fashion-mnist-small"
    device: str = "cpu"
    precision: Precision = "auto"
    memory_format: MemoryFormat = "auto"


def run_bench(
    widths: Sequence[int],
    setup: Setup,
    *,
    pairs: int,
    seconds: float,
    seeds: int,
    data_root: Path | None,
    append: Path | None,
    quiet: bool,
) -> list[Row]:
    """Measure all ways at every width; a row for each, which is shown and appended if wanted.

    ``pairs`` speed measurements of ``seconds`` for each way, in turn; accuracy over ``seeds``, not
    measured if 0.

    Raises :class:`SettingsWrong`, and ``DataError`` for images that do not exist.
    """
    if min(widths, default=0) < 1 or min(pairs, setup.rounds, setup.together) < 1:
        raise SettingsWrong("--widths, --pairs, --rounds and --together must be at least 1")
    if seconds <= 0 or seeds < 0:
        raise SettingsWrong("--seconds must be above 0, --seeds 0 or more")
    least = BATCH * len(setup.cuts)
    if setup.train_images < least:
        raise SettingsWrong(
            f"--train-images {setup.train_images}: {least} are a batch for every device"
        )
    for key, value, allowed in (
        ("rate-rule", setup.rate_rule, RATE_RULES),
        ("precision", setup.precision, get_args(Precision)),
    ):
        if value not in allowed:
            raise SettingsWrong(f"--{key} {value}: choose one of {', '.join(allowed)}")
    console = Console(stderr=True, quiet=quiet)
    images = rate_accuracy.load_images(
        rate_accuracy.Setup(setup.dataset, setup.train_images), data_root
    )
    rows = []
    for width in widths:
        server = Bench(width, setup, *images)
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for pair in range(pairs):
            for way, speed in server.speeds(seconds).items():
                speeds[way].append(speed)
            told = ", ".join(f"{way} {measured[-1]:.0f}" for way, measured in speeds.items())
            console.print(f"width {width} pair {pair + 1}/{pairs}: {told} samples/s")
        accuracies: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(seeds):
            for way in WAYS:
                accuracies[way].append(server.accuracy(way, seed))
                console.print(f"width {width} seed {seed} {way}: {100 * accuracies[way][-1]:.2f} %")
        rows += make_rows(server, speeds, accuracies)
    cells = [_cells(row) for row in rows]
    bench_rows.show("the server's step: in turn, by cut, in a cascade", _HEADER, cells, console)
    if append is not None:
        origin = [bench_rows.today(), bench_rows.machine(), bench_rows.commit()]
        bench_rows.append(append, [[*origin, *line] for line in cells])
    return rows


class Bench:
    """Server side and devices at one width of the network."""

    def __init__(self, width: int, setup: Setup, train: Dataset, test: Dataset) -> None:
        _, size, _, channels = train.images.shape
        self.setup = setup
        self.spec = NetworkSpec(
            width=width, channels=channels, size=size, classes=len(train.classes)
        )
        self._train, self._test = train, test
        self.compute = choose_compute(
            lambda: build_network(self.spec),
            (BATCH, channels, size, size),
            device=setup.device,
            precision=setup.precision,
            memory_format=setup.memory_format,
        )

    def speeds(self, seconds: float) -> dict[str, float]:
        """Samples per second of every way, measured one after the other.

        The learning rate is 0, so that every pass has the same numbers to compute.
        """
        network = build_network(self.spec)
        entries = self._entries(network)
        measured = {}
        for way in WAYS:
            engine = _engine(way, network, self.compute, self.setup.rate_rule)
            engine.begin(_start(network), 0.0)
            serve = _server(way, engine, self.setup.together)
            serve(entries)
            passes, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < seconds:
                serve(entries)
                passes += 1
            measured[way] = passes * BATCH * len(entries) / elapsed
        return measured

    def accuracy(self, way: str, seed: int) -> float:
        """Of the full network (0 to 1), after all rounds: the fleet's, without broker and codecs.

        Devices have one batch out and learn from its gradient before the next one.
        """
        network = build_network(self.spec, seed=seed)
        engine = _engine(way, network, self.compute, self.setup.rate_rule)
        serve = _server(way, engine, self.setup.together)
        devices = [_Device(self, index, seed) for index in range(len(self.setup.cuts))]
        quota = len(self._train) // (BATCH * len(devices))
        model = _start(network)
        for number in range(1, self.setup.rounds + 1):
            rate = learning_rate(RATE, number, self.setup.rounds, "cosine")
            engine.begin(model, rate)
            for device in devices:
                device.begin(model, rate)
            for _ in range(quota):
                steps = serve([device.send() for device in devices])
                for device, step in zip(devices, steps, strict=True):
                    device.learn(step)
            aggregation = Aggregation(
                model, first_server_block=min(self.setup.cuts), device_copies=True
            )
            for device in devices:
                aggregation.add_device(device.trainer.state(), quota * BATCH)
            engine.close(aggregation)
            model = aggregation.result()
        evaluator = Evaluator(build_network(self.spec), self.compute, self._test)
        return evaluator.scores(model.state, ()).server_accuracy

    def _entries(self, network: CutNetwork) -> list[Entry]:
        entries = []
        for index, cut in enumerate(self.setup.cuts):
            images, labels = self.stream(index, seed=0).batch(0)
            with torch.no_grad():
                features = network(torch.from_numpy(images), stop=cut)
            entries.append(Entry(str(index), cut, features, torch.from_numpy(labels)))
        return entries

    def stream(self, index: int, *, seed: int) -> BatchStream:
        """The batches of one device."""
        shares = partition(self._train.labels, len(self.setup.cuts), "iid", seed)
        return BatchStream(
            self._train, shares[index], batch_size=BATCH, seed=seed, device=str(index)
        )


class _Device:
    def __init__(self, bench: Bench, index: int, seed: int) -> None:
        self._name = str(index)
        self._cut = bench.setup.cuts[index]
        self._stream = bench.stream(index, seed=seed)
        self._position = 0
        self.trainer = DeviceTrainer(
            build_network(bench.spec, seed=seed).device_half(self._cut),
            bench.compute,
            exit_weight=1.0,
            feedback_weight=1.0,
            momentum=MOMENTUM,
            weight_decay=DECAY,
        )

    def begin(self, model: Model, rate: float) -> None:
        self.trainer.load(half_of(model.state, self._cut))
        self.trainer.set_learning_rate(rate)

    def send(self) -> Entry:
        images, labels = self._stream.batch(self._position)
        features = self.trainer.forward(self._position, images, labels)
        return Entry(self._name, self._cut, features, torch.from_numpy(labels))

    def learn(self, step: Step) -> None:
        self.trainer.backward(self._position, step.gradient)
        self._position += 1


def _engine(
    way: str, network: CutNetwork, compute: Compute, rule: RateRule
) -> Sequential | Cascade:
    if way == BASELINE:
        return Sequential(network, compute, momentum=MOMENTUM, weight_decay=DECAY)
    return Cascade(network, compute, momentum=MOMENTUM, weight_decay=DECAY, rate_rule=rule)


def _server(way: str, engine: Sequential | Cascade, most: int) -> Serve:
    """How this way trains on one batch of every device; raises what a refusal raises."""

    def in_turn(entries: Sequence[Entry]) -> list[Step]:
        return [engine.step(entry, want_gradient=True) for entry in entries]

    def together(entries: Sequence[Entry]) -> list[Step]:
        steps = []
        for outcome in engine.step_together(entries, want_gradients=True):
            if not isinstance(outcome, Step):
                raise outcome
            steps.append(outcome)
        return steps

    def by_cut(entries: Sequence[Entry]) -> list[Step]:
        steps: dict[str, Step] = {}
        for _, group in groupby(sorted(entries, key=_cut_of), _cut_of):
            batches = list(group)
            steps |= zip((e.device for e in batches), together(batches), strict=True)
        return [steps[entry.device] for entry in entries]

    def cascade(entries: Sequence[Entry]) -> list[Step]:
        parts = range(0, len(entries), most)
        return [step for first in parts for step in together(entries[first : first + most])]

    return {"in turn": in_turn, "equal cuts": by_cut, "cascade": cascade}[way]


def _cut_of(entry: Entry) -> int:
    return entry.cut


def _start(network: CutNetwork) -> Model:
    momentum = {
        name: np.zeros(tuple(parameter.shape), np.float32)
        for name, parameter in network.named_parameters()
        if block_of(name) is not None
    }
    return Model(read_state(network), momentum)


# -- rows -----------------------------------------------------------------------------------------

_HEADER = (
    "computed on",
    "threads",
    "width",
    "way",
    "together",
    "samples/s",
    "× in turn",
    "data",
    "seeds",
    "acc. %",
    "against in turn",
)


def make_rows(
    bench: Bench, speeds: dict[str, list[float]], accuracies: dict[str, list[float]]
) -> list[Row]:
    """A row for each way: medians of speeds and of their paired ratios, means of accuracies."""
    rows = []
    for way in WAYS:
        row: Row = {
            "compute": bench.compute.label,
            "threads": torch.get_num_threads(),
            "width": bench.spec.width,
            "way": way,
            "together": _most(way, bench.setup),
            "rate_rule": None if way == BASELINE else bench.setup.rate_rule,
            "samples_per_s": statistics.median(speeds[way]),
            "ratio": statistics.median(
                speed / plain for speed, plain in zip(speeds[way], speeds[BASELINE], strict=True)
            ),
            "images": bench.setup.train_images,
            "rounds": bench.setup.rounds,
            "seeds": len(accuracies[way]),
            "accuracy": statistics.fmean(accuracies[way]) if accuracies[way] else None,
            "difference": None,
            "half_interval": None,
        }
        if accuracies[way] and way != BASELINE:
            found = difference(
                [
                    100 * (accuracy - plain)
                    for accuracy, plain in zip(accuracies[way], accuracies[BASELINE], strict=True)
                ]
            )
            row["difference"], row["half_interval"] = found.mean, found.half
        rows.append(row)
    return rows


def _most(way: str, setup: Setup) -> int:
    """Batches in one step."""
    match way:
        case "in turn":
            return 1
        case "equal cuts":
            return max(Counter(setup.cuts).values())
        case _:
            return min(setup.together, len(setup.cuts))


def _cells(row: Row) -> list[str]:
    change = MISSING
    if row["difference"] is not None:
        change = f"{row['difference']:+.2f}"
        if row["half_interval"] is not None:
            change += f" ± {row['half_interval']:.2f}"
    return [
        row["compute"],
        str(row["threads"]),
        str(row["width"]),
        row["way"],
        str(row["together"]) + (f", {row['rate_rule']}" if row["rate_rule"] else ""),
        f"{row['samples_per_s']:.0f}",
        f"{row['ratio']:.2f}",
        f"{row['images']:,} × {row['rounds']} rounds" if row["seeds"] else MISSING,
        str(row["seeds"] or MISSING),
        MISSING if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}",
        change.replace("-", "−"),
    ]
