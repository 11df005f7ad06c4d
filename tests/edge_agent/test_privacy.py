"""What leaves a device of its images, and what is booked for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.messages import Noise, Telemetry
from broker.serving_messages import Features, Serving
from broker.training_messages import Activations, Report
from edge_agent.encoding import ActivationEncoder
from edge_agent.errors import AssignmentError, StateError
from edge_agent.learner import LearnerFactory
from edge_agent.privacy import Privacy, Release, ReleasedStream
from edge_agent.privacy_account import FILE, PrivacyAccount
from edge_agent.settings import AgentSettings
from tensors.batches import BatchStream, image_key, normalise
from tensors.decoding import decode
from tensors.privacy import GaussianMechanism, rho_of
from tests.attempt_desk import Desk, balanced
from tests.edge_agent.test_answers import SURE, UNSURE, images_of
from tests.edge_agent.test_answers import Desk as AnswerDesk
from tests.fake_device import FakeData, Harness, make_parameters, receipt_of
from tests.tiny import (
    NETWORK,
    Array,
    make_assignment,
    make_batch,
    make_dataset,
    make_round,
    make_serving,
)

NOISE = Noise(clip_norm=1.0, noise_std=2.0)
MECHANISM = GaussianMechanism(1.0, 2.0)
RHO = MECHANISM.rho


def ones(shape: tuple[int, ...]) -> Array:
    return np.ones(shape, np.float32)


def make_release(budget: float | None = None) -> tuple[Release, PrivacyAccount]:
    account = PrivacyAccount(None, budget=budget)
    return Release(MECHANISM, account, ones), account


class NoisyDesk(Desk):
    """An attempt whose images come again every ``epoch`` batches."""

    def __init__(self, *, budget: float | None = None, epoch: int = 2, **given: Any) -> None:
        self.release, self.account = make_release(budget)
        assignment = make_assignment(noise=NOISE)
        encoder = ActivationEncoder(assignment, uplink=lambda: 0.0, release=self.release)
        super().__init__(encoder=encoder, **given)
        self.stream.epoch = epoch
        self.attempt._stream = ReleasedStream(self.stream, self.release)


# -- training -------------------------------------------------------------------------------------


def test_what_is_sent_is_clipped_and_has_noise() -> None:
    desk = NoisyDesk()
    sent = decode(desk.produce()[1].tensor)  # batch 1: every feature is 1
    np.testing.assert_allclose(sent, np.ones((8, 1)) * 1.0 + 2.0, rtol=1e-5)


def test_every_epoch_of_an_image_is_booked() -> None:
    desk = NoisyDesk(epoch=2)
    desk.produce()
    desk.answer(0)
    desk.produce()
    assert desk.account.spent(b"0/0") == 2 * RHO
    assert desk.account.spent(b"1/7") == RHO


def test_what_is_said_again_is_not_released_again() -> None:
    desk = NoisyDesk()
    first = desk.produce()
    again = [envelope.message for envelope in desk.attempt.unanswered()]
    assert [message.tensor for message in first] == [
        message.tensor for message in again if isinstance(message, Activations)
    ]
    assert desk.account.summary().releases == 16


def test_what_is_computed_again_is() -> None:
    """Another attempt at a round draws other noise for the same images."""
    desk = NoisyDesk()
    desk.produce()
    desk.attempt._stream.batch(0)
    assert desk.account.spent(b"0/0") == 2 * RHO


def test_images_whose_budget_is_used_up_are_left_out() -> None:
    desk = NoisyDesk(budget=RHO)
    desk.account.charge([b"0/1", b"0/2"], RHO)
    sent = desk.produce()
    assert len(sent[0].labels) == 6 == len(decode(sent[0].tensor))
    assert sent[0].labels == [0, 3, 0, 1, 2, 3]
    assert len(sent[1].labels) == 8


def test_a_batch_of_which_nothing_may_leave_is_lost_and_the_attempt_ends() -> None:
    desk = NoisyDesk(budget=RHO, epoch=1)
    sent = desk.produce()
    assert len(sent) == 1
    desk.answer(0)
    assert not desk.produce()
    assert desk.attempt.complete
    assert desk.report.discarded == {"privacy": 3}
    assert balanced(desk.report)
    assert desk.meters.counters["batches_lost"]["privacy"] == 3
    assert desk.account.summary().rho_max == RHO


# -- answering ------------------------------------------------------------------------------------


def noisy_answers(budget: float | None = None) -> tuple[AnswerDesk, PrivacyAccount]:
    desk = AnswerDesk(audit_share=0.0)
    release, account = make_release(budget)
    model = desk.answers._model
    assert model is not None
    desk.answers.use(
        model.run,
        model.version,
        model.predictor,
        desk.served,
        model.codec,
        shape=model.shape,
        release=release,
    )
    return desk, account


def test_features_of_an_offload_are_clipped_noised_and_booked() -> None:
    desk, account = noisy_answers()
    desk.ask((2, UNSURE), (1, SURE))
    (sent,) = desk.work()
    unsure, sure = (image_key(image) for image in images_of((2, UNSURE), (1, SURE)))
    received = decode(sent.tensor)
    assert len(received) == 1
    np.testing.assert_allclose(np.linalg.norm(received - 2.0), 1.0, rtol=1e-5)
    assert (account.spent(unsure), account.spent(sure)) == (RHO, 0.0)


def test_an_image_without_budget_is_answered_by_the_exit_alone() -> None:
    desk, account = noisy_answers(budget=RHO)
    for _ in range(2):
        desk.ask((2, UNSURE))
        for sent in desk.work():
            desk.reply(sent, 3)
    first, second = desk.done().values()
    assert (first.by, second.by) == (("server",), ("fallback",))  # type: ignore[union-attr]
    assert second.reasons == ("privacy",)  # type: ignore[union-attr]
    assert desk.answers.counts.held == {"privacy": 1}
    assert account.summary().rho_max == RHO


def test_only_those_of_a_message_that_have_budget_are_asked_about() -> None:
    desk, account = noisy_answers(budget=RHO)
    account.charge([image_key(images_of((1, UNSURE))[0])], RHO)
    desk.ask((0, UNSURE), (1, UNSURE), (2, UNSURE))
    (sent,) = desk.work()
    assert decode(sent.tensor).argmax(1).size == 2
    desk.reply(sent, 3, 3)
    assert desk.only().by == ("server", "fallback", "server")


def test_what_is_not_asked_for_other_reasons_is_not_booked() -> None:
    desk, account = noisy_answers()
    desk.answers.disconnected()
    desk.ask((2, UNSURE))
    assert not desk.work()
    assert account.summary().images == 0


def test_an_audit_is_a_release() -> None:
    desk, account = noisy_answers()
    desk.served = desk.served.__class__(
        rule="max_softmax", threshold=0.5, timeout_s=2.0, audit_share=1.0
    )
    desk.policy.use(desk.served, run="run", version=1)
    desk.ask((1, SURE))
    assert len(desk.work()) == 1
    assert account.spent(image_key(images_of((1, SURE))[0])) == RHO


# -- one device -----------------------------------------------------------------------------------


def test_training_and_the_measurement_after_it_are_in_one_account() -> None:
    tests = [(images_of((1, UNSURE), (2, UNSURE)), np.array([1, 2]))]
    agent = Harness(data=FakeData(tests), privacy=Privacy(normal=ones))
    announced = make_round()
    agent.join(make_assignment(noise=NOISE), announced)
    sent = [message for message in agent.work() if isinstance(message, Activations)]
    assert len(sent) == 2
    serving: Serving = make_serving()
    agent.hear(serving, make_round(2, phase="inference"))
    agent.hear(make_parameters(0))
    asked = [message for message in agent.work() if isinstance(message, Features)]
    assert len(asked) == 1
    agent.core.tick()
    told = agent.core.telemetry().message
    assert isinstance(told, Telemetry)
    gauges = told.gauges
    assert gauges["privacy_rho"][""] == RHO
    assert gauges["privacy_images"]["within_budget"] == 16 + 2


def test_without_noise_nothing_is_booked_and_nothing_changes() -> None:
    agent = Harness()
    agent.join()
    first = agent.work()[0]
    assert isinstance(first, Activations)
    assert not decode(first.tensor).any()
    told = agent.core.telemetry().message
    assert isinstance(told, Telemetry)
    assert "privacy_rho" not in told.gauges


def test_the_device_demands_more_than_the_coordinator() -> None:
    own = Privacy(own=GaussianMechanism(0.5, 1.0))
    assert own.applied_to(make_assignment()).noise == Noise(clip_norm=0.5, noise_std=1.0)
    assert own.applied_to(make_assignment(noise=NOISE)).noise == Noise(clip_norm=0.5, noise_std=2.0)
    assert Privacy().applied_to(make_assignment(noise=NOISE)).noise == NOISE
    assert Privacy().release(make_assignment()) is None


def test_an_account_once_begun_also_books_what_leaves_without_noise(tmp_path: Path) -> None:
    first = Privacy(tmp_path).release(make_assignment(noise=NOISE))
    assert first is not None
    assert first.admit([b"a"]).all()
    later = Privacy(tmp_path).release(make_assignment())
    assert later is not None
    features = np.ones((1, 3), np.float32)
    assert later.of(features) is features
    assert later.admit([b"b"]).all()
    assert PrivacyAccount(tmp_path).summary().without_noise == 1


def test_where_the_account_cannot_be_begun_nothing_leaves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    release = Privacy(tmp_path / "file" / "state").release(make_assignment(noise=NOISE))
    assert release is not None
    assert release.admit([b"a", b"b"]).tolist() == [False, False]


def test_a_damaged_account_stops_the_agent_at_its_start(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"damaged" * 1000)
    settings = AgentSettings(device="cam-1", state_dir=tmp_path)
    with pytest.raises(StateError, match="unusable"):
        Privacy.by(settings, settings.state_dir)


def test_batchnorm_is_refused_for_it_mixes_the_images_of_a_batch() -> None:
    factory = LearnerFactory(device="cpu", precision="fp32", memory_format="contiguous")
    with pytest.raises(AssignmentError, match="BatchNorm lets every image"):
        factory.build(make_assignment(noise=NOISE))
    group = NETWORK.model_copy(update={"norm": "group"})
    learner = factory.build(make_assignment(noise=NOISE, network=group))
    images, labels = make_batch()
    together = learner.forward(0, images, labels)
    alone = learner.forward(1, images[:1], labels[:1])
    np.testing.assert_allclose(together[0].numpy(), alone[0].numpy(), rtol=1e-4, atol=1e-5)
    norms = together.flatten(1).norm(dim=1)
    assert bool((norms <= NOISE.clip_norm * (1 + 1e-6)).all())


def test_an_image_is_the_same_one_in_every_epoch_augmented_or_not_and_when_asked_about() -> None:
    data = make_dataset(16)
    plain, moved = (
        BatchStream(data, np.arange(16), batch_size=8, seed=0, device="a", augment=augment)
        for augment in ("none", "crop-flip")
    )
    assert plain.keys(0) == moved.keys(0)
    assert {*plain.keys(0), *plain.keys(1)} == {*plain.keys(2), *plain.keys(3)}
    row = int(plain.rows(0)[3])
    asked = normalise(data.images[row : row + 1], data.mean, data.std)
    assert plain.keys(0)[3] == image_key(asked[0])
    assert len({*plain.keys(0), *plain.keys(1)}) == 16


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"clip_norm": 1.0}, "go together"),
        ({"noise_std": 1.0}, "go together"),
        ({"privacy_rho": 1.0}, "needs noise to count"),
        (
            {"clip_norm": 1.0, "noise_std": 9.0, "privacy_rho": 1.0, "privacy_epsilon": 1.0},
            "one budget",
        ),
        ({"clip_norm": 9.0, "noise_std": 1.0, "privacy_rho": 1.0}, "raise noise_std"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AgentSettings(device="cam-1", **given)


def test_a_budget_may_be_given_as_epsilon() -> None:
    settings = AgentSettings(
        device="cam-1", clip_norm=1.0, noise_std=100.0, privacy_epsilon=3.0, privacy_delta=1e-6
    )
    assert settings.privacy_budget == rho_of(3.0, 1e-6)


def test_a_report_says_which_batches_were_given_up_for_privacy() -> None:
    desk = NoisyDesk(budget=RHO / 2)
    assert not desk.produce()
    report: Report = desk.report
    assert report.discarded == {"privacy": 4}
    desk.receipt(complete=True, final=True)
    assert receipt_of(desk.round).applied == []
