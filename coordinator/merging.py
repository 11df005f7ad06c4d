"""What devices bring to a round, on its way into the next version."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from coordinator.aggregation import Aggregation, Model
from coordinator.contribution import Contribution, Folded
from coordinator.defences.rules import Defences
from coordinator.observer import Observer

log = logging.getLogger("splitfleet.coordinator")


class Merging:
    """Takes contributions in and folds them together; ``model`` is what the round began with.

    Not begun until :meth:`begin`.
    """

    def __init__(
        self, model: Model, *, barrier: bool, defences: Defences, observer: Observer
    ) -> None:
        self._model = model
        self._barrier = barrier
        self._uploads = defences.uploads
        self._robust = defences.robust
        self._observer = observer
        self._version = 0
        self._aggregation: Aggregation | None = None
        self._early: list[Contribution] = []
        """Brought before there was anything to judge them by; few, see ``UploadLimits``."""
        self.late: list[Contribution] = []
        """Brought to earlier rounds, to be folded in at the end."""
        self.added: list[Folded] = []

    def begin(
        self,
        version: int,
        *,
        first_server_block: int,
        device_copies: bool,
        classifier: int | None = None,
    ) -> None:
        """Take in what is trained from ``version`` on; see ``Aggregation``."""
        self._version = version
        self._aggregation = Aggregation(
            self._model,
            first_server_block=first_server_block,
            device_copies=device_copies,
            robust=self._robust,
            classifier=classifier,
        )

    def add(self, brought: Contribution) -> None:
        """Take in what a device brought, to this round or an earlier one.

        What is of an earlier round is folded in at the end, so that it is not lost if this one is
        given up; and so is what nothing is known yet to judge it by.
        """
        if not self._barrier:
            self._fold(brought)
        elif brought.version != self._version:
            self.late.append(brought)
        else:
            waiting, self._early = [*self._early, brought], []
            for each in waiting:
                if self._uploads.can_judge(each.half):
                    self._fold(each)
                else:
                    self._early.append(each)

    def close(self, rest: Callable[[Aggregation], None]) -> Model:
        """The next version, of all that was brought and of what ``rest`` folds in."""
        assert self._aggregation is not None
        for waiting in (self._early, self.late):
            while waiting:
                self._fold(waiting.pop(0))
        rest(self._aggregation)
        merged, self._aggregation = self._aggregation.result(), None
        return merged

    def _fold(self, brought: Contribution) -> None:
        assert self._aggregation is not None
        start, samples = brought.start.state, brought.samples
        half, clipped = self._uploads.clip(brought.half, start, samples)
        if clipped:
            brought = replace(brought, half=half)
            self._observer.upload_clipped(brought.cut)
            about = {"device": brought.device}
            log.warning("the upload of %s is clipped", brought.device, extra=about)
        brought.fold(self._aggregation, self._model, self._version)
        self.added.append(brought.folded())
        if brought.version != self._version:
            self._observer.late_work("folded", samples)
