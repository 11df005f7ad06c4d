"""Where each device's network is cut, and how much it may have on the way."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

from broker.frames import OVERHEAD, Limits
from broker.messages import PROTOCOL, Hello
from coordinator.errors import DeviceRefused
from coordinator.programs import Programs, make_none
from coordinator.rounds import choose_cut, credits_of, most_devices
from coordinator.settings import CoordinatorSettings
from tensors.codecs import parse_codec
from tensors.networks import State

_NAME_BYTES = 256
"""More than the name, type and shape of a tensor take."""
_SLACK = 1.1
"""What a codec may add to what it cannot make smaller, and labels to features."""


class Placement:
    """Assigns cut layers and credits; ``shapes[c-1]`` is one image's features at cut ``c``.

    ``programs`` are what devices compute before the cut that do not have that as code.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        shapes: list[tuple[int, ...]],
        *,
        chunk_bytes: int,
        programs: Programs | None = None,
    ) -> None:
        self._settings = settings
        self._chunk_bytes = chunk_bytes
        self.shapes = shapes
        self.programs = programs or Programs("", make_none)

    @property
    def classifier(self) -> int | None:
        """The network's last block, if devices keep that and the labels."""
        return len(self.shapes) if self._settings.labels == "device" else None

    @property
    def deepest(self) -> int:
        """The last cut that a device can have."""
        return len(self.shapes) - (self.classifier is not None)

    def batch_bytes(self, cut: int) -> int:
        """The most bytes one message about a batch takes at ``cut``.

        Activations and their gradients; where devices keep the classifier last features, too.
        """
        shapes = self.shapes[cut - 1 : cut]
        if self.classifier is not None:
            shapes = [*shapes, self.shapes[-1]]
        codecs = (parse_codec(self._settings.codec), self._settings.codec_of_gradients)
        images = self._settings.batch_size
        return OVERHEAD + max(codec.max_bytes((images, *s)) for codec in codecs for s in shapes)

    def frame_limits(self, state: State) -> Limits:
        """Bounds on what has to be put together, of devices that hold parts of ``state``.

        No message is larger than all parameters, or a batch at any cut, uncompressed.
        """
        model = sum(values.nbytes + _NAME_BYTES for values in state.values())
        batch = 4 * self._settings.batch_size * max(math.prod(shape) for shape in self.shapes)
        usual = Limits()
        most = int(_SLACK * max(model, batch)) + (1 << 20)
        return replace(usual, message_bytes=min(usual.message_bytes, most))

    def credits(self, cut: int, devices: int) -> int:
        """Batches a device at ``cut`` may have out in a fleet of ``devices``."""
        return credits_of(
            window=self._settings.window,
            devices=devices,
            batch_chunks=math.ceil(self.batch_bytes(cut) / self._chunk_bytes),
            queue_chunks=self._settings.queue_chunks,
        )

    def room(self, cuts: Iterable[int]) -> int:
        """How many devices with these cuts may train at once without filling the broker's queue."""
        most = max((self.batch_bytes(cut) for cut in set(cuts)), default=1)
        return most_devices(
            batch_chunks=math.ceil(most / self._chunk_bytes),
            queue_chunks=self._settings.queue_chunks,
        )

    def cut_of(
        self, current: int | None, hello: Hello, training: Collection[int] = ()
    ) -> int | None:
        """The cut of a device; None if it has to be measured first.

        The operator's choice counts first, then the cut it has, then what its measurement allows.
        A frozen device is not measured, but given the shallowest cut that others are ``training``,
        for only an exit that somebody trains ever answers; else the first.

        Raises :class:`DeviceRefused` if the device cannot take part in this run.
        """
        network = self._settings.network
        if hello.protocol != PROTOCOL:
            raise DeviceRefused(
                f"it speaks version {hello.protocol} of the protocol, the coordinator {PROTOCOL}: "
                "update the older one"
            )
        if hello.image != (network.channels, network.size, network.size):
            raise DeviceRefused(
                f"its images are {hello.image} (channels, height, width), the network takes "
                f"{(network.channels, network.size, network.size)}"
            )
        if hello.classes > network.classes:
            raise DeviceRefused(
                f"its data has {hello.classes} classes, the network {network.classes}"
            )
        if hello.samples < 1:
            raise DeviceRefused("it has no training images")
        deepest = self.deepest
        if hello.frozen and self.classifier is not None:
            raise DeviceRefused(
                "it does not train (engine = onnxruntime), and with labels = device every device "
                "has to train the classifier: set labels = server, or engine = torch there"
            )
        if hello.cut is not None:
            if hello.cut > deepest:
                raise DeviceRefused(
                    f"its cut layer {hello.cut} does not exist: the network has cuts 1 to {deepest}"
                    + (" with labels = device" if self.classifier is not None else "")
                )
            return hello.cut
        if current is None and hello.frozen:
            return min(training, default=1)
        if current is not None or hello.measurement is None:
            return current
        return choose_cut(
            hello.measurement,
            [self.batch_bytes(cut) for cut in range(1, deepest + 1)],
            step_budget_ms=self._settings.step_budget_ms,
            memory_budget_mb=self._settings.memory_budget_mb,
        )
