"""Which version serves, as the training machine settles and announces it."""

from __future__ import annotations

import logging
from typing import Any

from broker.envelopes import Envelope, down
from broker.messages import Parameters
from broker.serving_messages import Serving
from coordinator import exit_policies, orders
from coordinator.checkpoint import Checkpoint
from coordinator.errors import StoreError
from coordinator.evaluation import Evaluator
from coordinator.observer import Observer
from coordinator.published import Published, whole_half
from coordinator.serving_choice import read_choice
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from coordinator.versions import Version, Versions
from tensors.codecs import parse_codec

log = logging.getLogger("splitfleet.coordinator")


def open_versions(
    settings: CoordinatorSettings,
    checkpoint: Checkpoint,
    store: Store,
    evaluator: Evaluator | None,
) -> Versions:
    """The versions of a run that begins or goes on at ``checkpoint``, in ``store``.

    Thresholds that were made with other settings are made anew.
    """
    trained = frozenset(checkpoint.trained_cuts)
    policies, current = exit_policies.restore(settings, checkpoint.policies, trained)
    if not current and trained:
        policies = exit_policies.policies_of(settings, evaluator, checkpoint.model.state, trained)

    def load(number: int) -> Version | None:
        try:
            found = store.at(number)
        except StoreError as exc:
            log.warning("version %d cannot answer: %s", number, exc)
            return None
        if found is None:
            return None
        trained = frozenset(found.trained_cuts)
        policies, _ = exit_policies.restore(settings, found.policies, trained)
        return Version(number, found.model.state, trained, policies)

    latest = Version(checkpoint.version, checkpoint.model.state, trained, policies)
    return Versions(
        latest,
        keep=settings.serving_versions,
        load=load,
        chosen=lambda: read_choice(store.folder).version,
    )


class ServingVersion:
    """Says which version serves, and gives its parameters to whoever asks."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        run: str,
        versions: Versions,
        evaluator: Evaluator | None,
        observer: Observer,
        classifier: int | None = None,
    ) -> None:
        self.versions = versions
        self._classifier = classifier
        self._settings = settings
        self._run = run
        self._evaluator = evaluator
        self._observer = observer
        self._said: Envelope | None = None
        self._packs: dict[tuple[int, int], bytes] = {}
        """Of the serving version, by its number and cut."""

    def close(self, published: Published) -> dict[str, Any]:
        """A round has closed with these parameters: choose their thresholds; for a checkpoint."""
        trained = frozenset(published.trained)
        state = published.model.state
        policies = exit_policies.policies_of(self._settings, self._evaluator, state, trained)
        self._closed = Version(published.version, state, trained, policies)
        return exit_policies.dump(self._settings, policies)

    def publish(self) -> None:
        """What was closed last is on disk: devices may be answered with it."""
        self.versions.publish(self._closed)

    def news(self) -> list[Envelope]:
        """The announcement, unless it was said already; it is retained."""
        serving = self.versions.serving
        announced = orders.serving(self._settings, self._run, serving)
        if announced == self._said:
            return []
        self._said = announced
        assert isinstance(announced.message, Serving)
        self._observer.serving(
            serving.number,
            pinned=self.versions.pinned is not None,
            cuts=announced.message.cuts,
        )
        return [announced]

    def say_again(self) -> list[Envelope]:
        """The announcement: the broker may have lost what it retained."""
        self._said = None
        return self.news()

    def pin(self, number: int | None) -> list[Envelope]:
        """Serve this version, or with None the last closed round's; what there is to say then."""
        if not self.versions.pin(number):
            log.warning(
                "version %s was chosen to serve, but there is no such version: version %d goes on",
                number,
                self.versions.serving.number,
            )
            self._observer.message_dropped("unknown_version")
        return self.news()

    def answer(self, device: str, cut: int, number: int) -> list[Envelope]:
        """The serving version's parameters, whole, if that is this ``number``; else nothing."""
        serving = self.versions.serving
        if number != serving.number:
            return []
        key = number, cut
        if key not in self._packs:
            self._packs = {known: pack for known, pack in self._packs.items() if known[0] == number}
            codec = parse_codec(self._settings.parameter_codec)
            self._packs[key] = whole_half(serving.state, cut, codec, classifier=self._classifier)
        pack = self._packs[key]
        message = Parameters(run=self._run, version=number, cut=cut, state=pack)
        return [down(device, message)]
