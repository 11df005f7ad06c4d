"""A device's half with its exit as a program for other runtimes: torch.export and ONNX.

``python -m tensors.programs CUT`` reads a :class:`NetworkSpec` as JSON and writes a
:class:`Program` as MessagePack: in a process of its own, for tracing changes state that all threads
of torch share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import numpy as np
import torch

from tensors.errors import ProgramError, TensorsError
from tensors.networks import Exits, NetworkSpec, build_network, read_state
from tensors.onnx_half import EXTERNAL, INPUT, OUTPUTS, OnnxHalf

CHECKED_BATCHES = (1, 2, 5)
"""Images at a time with which a program is compared with PyTorch."""
TOLERANCE = 1e-4
"""Of the largest value of an output: another runtime adds up in another order."""
MOST_IMAGES = 65_536
"""The largest batch a program takes."""
Outputs = tuple[np.ndarray, ...]


def random_images(spec: NetworkSpec, count: int) -> np.ndarray:
    """So many images of noise: float32 (count, channels, size, size)."""
    shape = (count, spec.channels, spec.size, spec.size)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def traced(half: Exits, spec: NetworkSpec) -> torch.export.ExportedProgram:
    """The half for any number of images. Raises :class:`ProgramError`."""
    example = torch.from_numpy(random_images(spec, 2))
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        return torch.export.export(half, (example,), dynamic_shapes=({0: batch},))
    except Exception as exc:
        if not isinstance(exc, RuntimeError | ValueError | TypeError | AssertionError):
            raise
        raise ProgramError(
            f"torch.export cannot follow this network ({exc}): its blocks must not decide by the "
            "values of tensors or by the number of images"
        ) from exc


def need_onnx() -> None:
    """Raise :class:`ProgramError` where ONNX cannot be written, or not be compared."""
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as exc:
        raise ProgramError(
            f"ONNX cannot be written here ({exc}): pip install 'splitfleet[export]'"
        ) from exc
    del onnx, onnxruntime, onnxscript


def onnx_model(half: Exits, spec: NetworkSpec, *, optimize: bool = True) -> Any:
    """The half as an ``onnx.ModelProto``; ``optimize`` folds what is constant, parameters included.

    Raises :class:`ProgramError`.
    """
    from tensors.torchvision_compat import torchvision_module

    with contextlib.suppress(ImportError):
        torchvision_module()  # the exporter imports it, which fails beside a CPU build of torch
    made: Any = torch.onnx.export(
        traced(half, spec),
        dynamo=True,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        optimize=optimize,
        verbose=False,
    )
    return made.model_proto


def compare(half: Exits, run: Callable[[np.ndarray], Outputs], spec: NetworkSpec) -> float:
    """The largest difference of any output of ``run``, as a share of its largest value.

    Raises :class:`ProgramError` if it is above :data:`TOLERANCE`.
    """
    worst = 0.0
    for count in CHECKED_BATCHES:
        images = random_images(spec, count)
        with torch.inference_mode():
            wanted = [output.numpy() for output in half(torch.from_numpy(images))]
        for name, ours, theirs in zip(OUTPUTS, wanted, run(images), strict=True):
            if ours.shape != theirs.shape:
                raise ProgramError(f"{name} have shape {theirs.shape}, PyTorch's {ours.shape}")
            difference = float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-12))
            if not difference <= TOLERANCE:
                raise ProgramError(
                    f"{name} of {count} images differ from PyTorch's by {difference:.1e}: this "
                    "network cannot be exported in this format; nothing was written"
                )
            worst = max(worst, difference)
    return worst


@dataclass(frozen=True, slots=True)
class Program:
    """What ``OnnxHalf`` runs: the graph, and the shapes of the parameters it takes."""

    graph: bytes
    parameters: dict[str, list[int]]


def onnx_program(spec: NetworkSpec, cut: int) -> Program:
    """The half at ``cut`` in evaluation mode, without its parameters.

    It is run with other parameters than it was made with, and compared with PyTorch. Raises
    :class:`ProgramError`, and ``NetworkError`` for a network that cannot be built.
    """
    need_onnx()
    half = _half(spec, cut, seed=0)
    with quiet():
        model = onnx_model(half, spec, optimize=False)
    names = read_state(half.network).keys()
    _detach_parameters(model, names)
    taken = {t.name: list(t.dims) for t in model.graph.initializer if t.name in names}
    other = _half(spec, cut, seed=1)
    state = read_state(other.network)
    program = Program(model.SerializeToString(), taken)
    run = OnnxHalf(program.graph, {name: state[name] for name in taken}, threads=1).run
    compare(other, run, spec)
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch's exporters say of themselves concerns nobody here."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _half(spec: NetworkSpec, cut: int, *, seed: int) -> Exits:
    """One whose BatchNorm statistics, too, are those of that seed."""
    half = Exits(build_network(spec, seed=seed).device_half(cut))
    if seed:
        with torch.no_grad():
            half.train()(torch.from_numpy(random_images(spec, 8)))
    return half.eval()


def _detach_parameters(model: Any, names: Collection[str]) -> None:
    """Name the parameters as the network does, and leave their values out.

    What no node asks for, such as BatchNorm's counters, is not in the program.
    """
    import onnx

    inside = "network."  # where Exits has the half
    for tensor in model.graph.initializer:
        name = tensor.name.removeprefix(inside)
        if name in names:
            about = onnx.TensorProto(
                name=name,
                dims=tensor.dims,
                data_type=tensor.data_type,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            about.external_data.add(key="location", value=EXTERNAL)
            tensor.CopyFrom(about)
    for node in model.graph.node:
        inputs = [(name, name.removeprefix(inside)) for name in node.input]
        node.input[:] = [own if own in names else name for name, own in inputs]
        del node.metadata_props[:]  # where in which source file it comes from
    del model.graph.value_info[:]


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    spec = NetworkSpec(**json.load(sys.stdin))
    try:
        program = onnx_program(spec, int(sys.argv[1]))
    except TensorsError as exc:
        sys.exit(" ".join(str(exc).split()))
    msgpack.pack(asdict(program), sys.stdout.buffer)


if __name__ == "__main__":
    main()
