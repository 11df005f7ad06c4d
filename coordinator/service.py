"""The coordinator as a service: built from its settings, driven over a transport."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from broker.branches import Branches
from broker.drive import Machine
from broker.envelopes import Envelope
from broker.errors import TransportError
from broker.link import DEFAULT_CHUNK_BYTES, Link, single_frame
from broker.logs import LogControl, Untouched
from broker.messages import Coordinator
from broker.topics import Topics
from broker.transport import Transport, Will
from coordinator.aggregation import Model, block_of
from coordinator.checkpoint import Checkpoint
from coordinator.core import CoordinatorCore
from coordinator.defences.rules import defences
from coordinator.defences.steps import StepLimits
from coordinator.device_labels import RoundWithDeviceLabels
from coordinator.driving import drive_all
from coordinator.engines import Engine, make_engine
from coordinator.errors import ResumeError, StoreError
from coordinator.evaluation import Evaluator
from coordinator.gradients import GradientEncoder
from coordinator.health import Vitals
from coordinator.identity.enrolment import Enrolment
from coordinator.identity.standing import IDENTITY
from coordinator.intake import Intake
from coordinator.observer import Observer
from coordinator.placement import Placement
from coordinator.programs import Making, Programs, make_in_child, make_none
from coordinator.responder import Responder
from coordinator.serving import ANSWERING, TRAINING, Answers, Network, route
from coordinator.serving_version import open_versions
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from coordinator.traffic import Traffic
from coordinator.training import RoundInProgress
from coordinator.updates.rollouts import UPDATES, Rollouts
from coordinator.watching import watch
from tensors.codecs import Codec, Encode, parse_codec
from tensors.datasets import IMAGE_FOLDER, Dataset, load_dataset
from tensors.errors import DataError
from tensors.networks import NetworkSpec, build_network, feature_shapes, read_state
from tensors.training import Compute, choose_compute

log = logging.getLogger("splitfleet.coordinator")


def new_boot() -> str:
    """A name for this life of the process."""
    return secrets.token_hex(8)


def new_vitals(settings: CoordinatorSettings) -> Vitals:
    """For :func:`run_coordinator` to keep current, and for others to ask."""
    names = (TRAINING, ANSWERING, *([IDENTITY, UPDATES] if settings.fleet_dir else []))
    return Vitals(names, bound_s=settings.stall_s, clock=time.monotonic)


def last_will(settings: CoordinatorSettings, boot: str) -> Will:
    """What the broker says when the coordinator vanishes."""
    return Will(
        Topics(settings.fleet).all("coordinator"),
        single_frame(Coordinator(state="offline", boot=boot)),
        retain=True,
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """What a coordinator computes with; :func:`torch_parts` is what a real one has.

    ``shapes[c-1]`` is the shape of one image's features at cut ``c``. ``first`` makes version 0 of
    a new run, ``new_engine`` the engine of a round, ``network`` answers what devices offload,
    ``encode`` encodes gradients, ``make_program`` makes a device's half to be computed as it is.
    """

    shapes: list[tuple[int, ...]]
    first: Callable[[], Model]
    new_engine: Callable[[], Engine]
    network: Network
    evaluator: Evaluator | None = None
    channels_last: bool = False
    encode: Encode = Codec.encode
    make_program: Making = make_none


def torch_parts(settings: CoordinatorSettings) -> Parts:
    """The network of the settings, on the machine they name.

    Raises ``NetworkError`` and ``DataError``.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    spec = NetworkSpec(**settings.network.model_dump())
    network = build_network(spec, seed=settings.seed)
    blocks = [network.blocks[str(index)] for index in range(network.stop)]
    shapes = feature_shapes(blocks, spec)[:-1]
    dataset = held_out_images(settings)
    compute = _compute(settings, spec)
    limits = StepLimits(settings.loss_mads, settings.gradient_clip, settings.max_devices)
    log.info("computing on %s", compute.label)

    def first() -> Model:
        momentum = {
            name: np.zeros(tuple(parameter.shape), np.float32)
            for name, parameter in network.named_parameters()
            if block_of(name) is not None
        }
        return Model(read_state(network), momentum)

    def new_engine() -> Engine:
        return make_engine(
            settings.strategy,
            network,
            compute,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            limits=limits,
            classifier=settings.labels == "server",
        )

    return Parts(
        shapes,
        first,
        new_engine,
        # Two more than are answered: for the version that was chosen, and the one chosen before.
        Responder(
            network,
            compute,
            versions=settings.serving_versions + 2,
            classifier=settings.labels == "server",
        ),
        None
        if dataset is None
        else Evaluator(copy.deepcopy(network), compute, dataset, mechanism=settings.mechanism),
        compute.channels_last,
        make_program=make_in_child(spec),
    )


def new_run() -> str:
    """A name for a run that begins now."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)


def open_run(
    settings: CoordinatorSettings,
    store: Store,
    first: Callable[[], Model],
    *,
    fresh: bool,
    name: Callable[[], str] = new_run,
) -> tuple[str, Checkpoint]:
    """The run to go on with and its last closed round, or a new run at version 0.

    Raises:
        ResumeError: the run in the state folder was made with other settings.
        StoreError: its files cannot be read, or a new run cannot be written.
    """
    current = None if fresh else store.current()
    if current is not None:
        run, identity = current
        wanted = settings.identity()
        made = _with_defaults(identity)
        odd = sorted(key for key in wanted if made.get(key) != wanted[key])
        if odd:
            raise ResumeError(
                f"the run {run} in {settings.state_dir} was made with "
                f"{odd[0]} = {made.get(odd[0])!r}, now it is {wanted[odd[0]]!r}; "
                "keep the old setting, or start over with --fresh"
            )
        checkpoint = store.latest()
        if checkpoint is not None:
            log.info("going on with run %s after round %d", run, checkpoint.round)
            return run, checkpoint
    run, checkpoint = name(), Checkpoint(version=0, round=0, model=first())
    store.create(run, settings.identity(), checkpoint)
    return run, checkpoint


def _with_defaults(identity: dict[str, object]) -> dict[str, object]:
    """A setting that was not there yet when a run was made had its default."""
    defaults = CoordinatorSettings().identity()
    whole = defaults | identity
    parts = defaults["network"], identity.get("network")
    if all(isinstance(part, dict) for part in parts):
        whole["network"] = {**parts[0], **parts[1]}  # type: ignore[dict-item]
    return whole


def build_core(
    settings: CoordinatorSettings,
    *,
    observer: Observer,
    traffic: Callable[[], dict[str, int]],
    boot: str,
    clock: Callable[[], float],
    fresh: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    parts: Parts | None = None,
    store: Store | None = None,
    name: Callable[[], str] = new_run,
) -> CoordinatorCore:
    """Put a coordinator together: store, network, engine, evaluation, state machine.

    ``parts`` and ``store`` are made from the settings unless they are given; ``name`` is asked for
    the name of a new run.

    Raises the errors of :func:`open_run` and :func:`torch_parts`.
    """
    parts = parts or torch_parts(settings)
    store = store or Store(settings.state_dir, keep=settings.keep_checkpoints)
    run, checkpoint = open_run(settings, store, parts.first, fresh=fresh, name=name)
    placement = Placement(
        settings,
        parts.shapes,
        chunk_bytes=chunk_bytes,
        programs=Programs(run, parts.make_program),
    )
    gradients = None
    if settings.feedback == "gradient":
        codec = settings.codec_of_gradients
        gradients = GradientEncoder(
            codec,
            masked=settings.mask_gradients,
            bytes_per_sample=settings.bytes_per_sample,
            follow_link=settings.follow_link,
            encode=parts.encode,
            logits=settings.distill_weight > 0,
            took=partial(observer.codec_took, "encode"),
            clock=clock,
        )

    intake = Intake(
        parts.shapes,
        classes=settings.network.classes,
        batch_size=settings.batch_size,
        channels_last=parts.channels_last,
        classifier=placement.classifier,
    )

    kind: Callable[..., RoundInProgress] = RoundInProgress
    if settings.labels == "device":
        kind = partial(RoundWithDeviceLabels, codec=parse_codec(settings.codec))

    def new_round(model: Model, server_rate: float) -> RoundInProgress:
        return kind(
            parts.new_engine(),
            model,
            server_rate,
            intake=intake,
            gradients=gradients,
            device_copies=settings.device_copies,
            barrier=settings.aggregation == "rounds",
            kept=settings.late_devices if settings.staleness else 0,
            grant=placement.credits,
            observer=observer,
            clock=clock,
            defences=rules,
        )

    core = CoordinatorCore(
        settings,
        run,
        checkpoint,
        new_round=new_round,
        answers=Answers(open_versions(settings, checkpoint, store, parts.evaluator), parts.network),
        evaluator=parts.evaluator,
        placement=placement,
        store=store,
        observer=observer,
        traffic=traffic,
        boot=boot,
        clock=clock,
    )
    rules = defences(
        settings,
        state_dir=settings.state_dir,
        devices=settings.max_devices,
        refused=core.guard.refused,
    )
    with contextlib.suppress(StoreError):  # who watches it complains
        core.pin(core.versions.chosen())
    return core


async def run_coordinator(
    settings: CoordinatorSettings,
    transport: Transport,
    core: CoordinatorCore,
    traffic: Traffic,
    *,
    stop: asyncio.Event,
    vitals: Vitals | None = None,
    logs: LogControl | None = None,
    enrolment: Enrolment | None = None,
    rollouts: Rollouts | None = None,
) -> None:
    """Serve the fleet until the run has finished or ``stop`` is set, and keep ``vitals`` current.

    ``logs`` says where the run is, and follows ``splitfleet log-level``. ``enrolment`` signs for
    devices and ``rollouts`` brings them updates; the settings must have their ``fleet_dir``.
    ``transport`` must have :func:`last_will` with the core's boot as its will.

    Raises ``ConnectRefused``, and ``StoreError`` when a checkpoint cannot be written.
    """
    topics = Topics(settings.fleet)
    async with transport:
        link = Link(
            transport,
            topics,
            observer=traffic,
            clock=time.monotonic,
            limits=core.frame_limits,
            admit=core.guard.admit,
            system=traffic.system,
        )
        traffic.blame = core.guard.dropped
        traffic.overruns = lambda: transport.dropped
        await link.subscribe(*topics.coordinator_filters())
        beside: dict[str, Machine] = {ANSWERING: core.answering}
        if enrolment is not None:
            await link.subscribe(*topics.claims_filters())
            beside[IDENTITY] = enrolment
        if rollouts is not None:
            beside[UPDATES] = rollouts
        branches = Branches(link, (TRAINING, *beside), route, patient=(IDENTITY, UPDATES))
        try:
            own = settings.answer_threads or max(1, torch.get_num_threads() // 2)
            for name, threads in ((TRAINING, torch.get_num_threads()), (ANSWERING, own)):
                branches[name].call(partial(_compute_with, threads))
            vitals = vitals or new_vitals(settings)
            watching = watch(core, branches, vitals, logs or Untouched(), settings, enrolment)
            await drive_all(core, beside, branches, vitals, watching, stop)
        finally:  # an error, too, ends the connection in good order: no last will follows
            with contextlib.suppress(TransportError):
                await link.send(core.goodbye())


def _compute_with(threads: int) -> Sequence[Envelope]:
    """Use so many in what this thread computes; without the look it would take over another's."""
    torch.set_num_threads(threads)
    torch.get_num_threads()
    return ()


def held_out_images(settings: CoordinatorSettings) -> Dataset | None:
    """The images that ``settings`` want checkpoints scored on, if any.

    Raises ``DataError`` for images that are missing or do not fit the network.
    """
    if settings.dataset is None:
        return None
    network = settings.network
    dataset = load_dataset(
        settings.dataset,
        "test",
        root=settings.data_root,
        download=settings.download,
        size=network.size if settings.dataset.startswith(IMAGE_FOLDER) else None,
    )
    _, height, width, channels = dataset.images.shape
    if (channels, height, width) != (network.channels, network.size, network.size):
        raise DataError(
            f"the images of {settings.dataset} are {channels}×{height}×{width} (channels, height, "
            f"width), the network takes {network.channels}×{network.size}×{network.size}: choose a "
            "data set that fits, or set channels and size of the network to the data's"
        )
    if len(dataset.classes) > network.classes:
        raise DataError(
            f"{settings.dataset} has {len(dataset.classes)} classes, the network "
            f"{network.classes}: choose a data set that fits, or set classes of the network to the "
            "data's"
        )
    return dataset


def _compute(settings: CoordinatorSettings, spec: NetworkSpec) -> Compute:
    shape = (settings.batch_size, spec.channels, spec.size, spec.size)
    return choose_compute(
        lambda: build_network(spec),
        shape,
        device=settings.device,
        precision=settings.precision,
        memory_format=settings.memory_format,
    )
