"""A device's half as an ONNX program whose parameters come from outside, on onnxruntime. No torch.

The program names its parameters as the network does, as *external data* that is not beside it: what
it is run with takes their place in memory, so a new version of them needs no new program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tensors.errors import ProgramError

INPUT, OUTPUTS = "images", ("features", "logits")
EXTERNAL = "parameters"
"""The file that the program says its parameters lie in; there is none."""

Float32s = npt.NDArray[np.float32]


class OnnxHalf:
    """Runs ``graph`` with the parameters ``state``, of exactly the names that it lists.

    ``threads``: how many compute; None leaves it to onnxruntime.

    Raises :class:`ProgramError` for a graph that does not run with this state, or without
    onnxruntime.
    """

    def __init__(
        self, graph: bytes, state: Mapping[str, npt.NDArray[Any]], *, threads: int | None = None
    ) -> None:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # it keeps what the largest batch ever took
        options.intra_op_num_threads = threads or 0
        # They are only borrowed, until the session has its own.
        values = {name: np.ascontiguousarray(values) for name, values in state.items()}
        options.add_external_initializers(
            list(values),
            [onnxruntime.OrtValue.ortvalue_from_numpy(each) for each in values.values()],
        )
        try:
            self._session = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
            self.run(np.zeros((1, *self._session.get_inputs()[0].shape[1:]), np.float32))
        except Exception as exc:  # onnxruntime's own have no base but this
            raise ProgramError(f"the program does not run with these parameters: {exc}") from exc

    def run(self, images: Float32s) -> tuple[Float32s, Float32s]:
        """Images (float32, N×C×H×W) → features at the cut (N×…), logits of the exit (N×K)."""
        features, logits = self._session.run(list(OUTPUTS), {INPUT: images})
        return features, logits


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        raise ProgramError(
            f"onnxruntime is missing ({exc}): pip install 'splitfleet[lite]'"
        ) from exc
    return onnxruntime
