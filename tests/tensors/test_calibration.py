from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensors import Curve, ExitRule, ExitRuleError, confidence, exits, offload_curve
from tensors.calibration import (
    ANSWER_ALL,
    OFFLOAD_ALL,
    for_accuracy,
    for_offload_rate,
    share_interval,
    top_answers,
)

RULES: tuple[ExitRule, ...] = get_args(ExitRule)
shares = st.sampled_from([i / 12 for i in range(13)]) | st.floats(0, 1)


@dataclass
class HeldOut:
    """What exit and server say of a few samples, and the truth; confidences often tie."""

    probabilities: npt.NDArray[np.float64]
    server: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def curve(self, rule: ExitRule = "entropy") -> Curve:
        return offload_curve(self.probabilities, self.server, self.labels, rule)

    def outcome(self, threshold: float, rule: ExitRule = "entropy") -> tuple[int, int]:
        """Exits and right answers, sample by sample."""
        gone = exits(confidence(self.probabilities, rule), threshold)
        answers = np.where(gone, self.probabilities.argmax(axis=1), self.server)
        return int(gone.sum()), int((answers == self.labels).sum())

    def thresholds(self, rule: ExitRule = "entropy") -> list[float]:
        """One for every set of samples that can exit."""
        sure = confidence(self.probabilities, rule)
        return [-1.0, 1.0, *sorted(set(sure[~np.isnan(sure)].tolist()))]


@st.composite
def held_out(draw: st.DrawFn, *, classes: int = 3) -> HeldOut:
    count = draw(st.integers(1, 12))
    parts = st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any)
    rows = draw(st.lists(parts, min_size=count, max_size=count))
    weights = np.array(rows, np.float64)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    blank = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    if draw(st.booleans()):
        probabilities[np.array(blank)] = np.nan
    numbers = st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)
    return HeldOut(probabilities, np.array(draw(numbers)), np.array(draw(numbers)))


def sure_of(*sure: float) -> npt.NDArray[np.float64]:
    """Rows of two classes that answer 0, with these margins."""
    return np.array([[(1 + m) / 2, (1 - m) / 2] for m in sure])


class TestCurve:
    @given(data=held_out(), rule=st.sampled_from(RULES), between=st.floats(-2, 2))
    def test_has_every_threshold_counted_sample_by_sample(
        self, data: HeldOut, rule: ExitRule, between: float
    ) -> None:
        curve = data.curve(rule)
        for threshold in [*data.thresholds(rule), between, math.inf, -math.inf]:
            i = curve.index(threshold)
            assert (curve.exits[i], curve.correct[i]) == data.outcome(threshold, rule)
        for i, threshold in enumerate(curve.thresholds):
            assert (curve.exits[i], curve.correct[i]) == data.outcome(threshold, rule)
            assert curve.index(threshold) == i

    @given(data=held_out(), rule=st.sampled_from(RULES))
    def test_offloads_fall_with_the_threshold_from_all_to_those_without_confidence(
        self, data: HeldOut, rule: ExitRule
    ) -> None:
        curve = data.curve(rule)
        assert (np.diff(curve.thresholds) < 0).all()
        assert (np.diff(curve.offload_rate) < 0).all()
        assert curve.offload_rate[0] == 1
        blank = np.isnan(data.probabilities).any(axis=1)
        assert curve.offload_rate[-1] == blank.mean()

    @given(data=held_out(), seed=st.integers(0, 99))
    def test_depends_neither_on_the_order_nor_on_the_names_of_the_classes(
        self, data: HeldOut, seed: int
    ) -> None:
        # Where a row's best classes tie, the first is taken, so names do matter there.
        best = np.sort(data.probabilities, axis=1)
        data.probabilities[best[:, -1] == best[:, -2]] = [1.0, 0.0, 0.0]
        rng = np.random.default_rng(seed)
        rows, names = rng.permutation(len(data.labels)), rng.permutation(3)
        places = np.argsort(names)
        shuffled = HeldOut(
            data.probabilities[rows][:, places], names[data.server[rows]], names[data.labels[rows]]
        )
        one, other = data.curve("max_softmax"), shuffled.curve("max_softmax")
        for key in ("levels", "thresholds", "exits", "correct"):
            np.testing.assert_array_equal(getattr(one, key), getattr(other, key), key)

    @given(data=held_out(), times=st.integers(2, 4))
    def test_the_same_samples_again_change_no_share(self, data: HeldOut, times: int) -> None:
        again = HeldOut(
            np.tile(data.probabilities, (times, 1)),
            np.tile(data.server, times),
            np.tile(data.labels, times),
        )
        np.testing.assert_allclose(again.curve().accuracy, data.curve().accuracy, rtol=1e-15)
        np.testing.assert_array_equal(again.curve().thresholds, data.curve().thresholds)

    def test_takes_the_exit_where_it_is_sure_and_the_server_elsewhere(self) -> None:
        p = np.array([[0.95, 0.05], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
        curve = offload_curve(p, [1, 1, 0, 1], [0, 1, 1, 1], "margin")
        assert curve.at([-1.0, 0.0, 0.5, 0.9, math.nan]) == [
            {"threshold": -1.0, "exit_rate": 1.0, "accuracy": 0.5},
            {"threshold": 0.0, "exit_rate": 0.75, "accuracy": 0.75},
            {"threshold": 0.5, "exit_rate": 0.5, "accuracy": 1.0},
            {"threshold": 0.9, "exit_rate": 0.0, "accuracy": 0.5},
            pytest.approx({"threshold": math.nan, "exit_rate": 0.0, "accuracy": 0.5}, nan_ok=True),
        ]

    def test_samples_equally_sure_exit_together(self) -> None:
        curve = offload_curve(sure_of(0.5, 0.5, 0.5), [0, 0, 0], [0, 0, 0], "margin")
        assert curve.thresholds.tolist() == [OFFLOAD_ALL, ANSWER_ALL]
        assert curve.exits.tolist() == [0, 3]

    def test_without_any_confidence_all_is_offloaded(self) -> None:
        curve = offload_curve(np.full((3, 2), np.nan), [0, 1, 1], [0, 0, 1])
        assert curve.thresholds.tolist() == [OFFLOAD_ALL]
        assert curve.exits.tolist() == [0]
        assert curve.accuracy.tolist() == [2 / 3]

    def test_rows_that_are_not_finite_are_no_answers(self) -> None:
        p = np.array([[0.2, 0.8], [np.nan, 0.5], [np.inf, 0.0]])
        assert top_answers(p).tolist() == [1, -1, -1]
        curve = offload_curve(sure_of(0.5), [-1], [-1], "margin")
        assert curve.correct.tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("server", "labels"), [([0], [0, 0]), ([0, 0], [0]), ([0, 0, 0], [0, 0, 0])]
    )
    def test_lengths_that_differ_are_refused(self, server: list[int], labels: list[int]) -> None:
        p = np.full((2, 2), 0.5)
        with pytest.raises(ExitRuleError, match="equally many"):
            offload_curve(p, server, labels)
        with pytest.raises(ExitRuleError, match="and some"):
            offload_curve(p[:0], [], [])


class TestWantedAccuracy:
    @given(data=held_out(), rule=st.sampled_from(RULES), wanted=shares)
    def test_is_met_with_the_fewest_offloads_of_all_thresholds(
        self, data: HeldOut, rule: ExitRule, wanted: float
    ) -> None:
        choice = for_accuracy(data.curve(rule), wanted)
        samples = len(data.labels)
        outcomes = [data.outcome(threshold, rule) for threshold in data.thresholds(rule)]
        assert (choice.exits, choice.correct) == data.outcome(choice.threshold, rule)
        enough = [gone for gone, right in outcomes if right / samples >= wanted]
        assert choice.reached == bool(enough)
        if enough:
            assert choice.accuracy >= wanted
            assert choice.exits == max(enough)
        else:
            assert (choice.correct, choice.exits) == max((r, g) for g, r in outcomes)

    @given(data=held_out(), one=shares, other=shares)
    def test_more_of_it_never_offloads_less(self, data: HeldOut, one: float, other: float) -> None:
        less, more = (for_accuracy(data.curve(), wanted) for wanted in sorted((one, other)))
        assert more.offload_rate >= less.offload_rate or not more.reached

    @given(data=held_out(), wanted=shares, level=st.floats(0.51, 0.999))
    def test_a_promise_is_more_careful_than_the_held_out_share(
        self, data: HeldOut, wanted: float, level: float
    ) -> None:
        plain = for_accuracy(data.curve(), wanted)
        promised = for_accuracy(data.curve(), wanted, level=level)
        if promised.reached:
            assert plain.reached
            assert promised.offload_rate >= plain.offload_rate
            low, _ = share_interval(promised.correct, promised.samples, 2 * level - 1)
            assert low >= wanted - 1e-9

    def test_a_small_set_promises_less(self) -> None:
        def choice(samples: int) -> bool:
            p = sure_of(*np.linspace(0.1, 0.9, samples))
            zeros = np.zeros(samples, np.int64)
            return for_accuracy(offload_curve(p, zeros, zeros), 0.9, level=0.95).reached

        # All right: 0.9^28 > 0.05 >= 0.9^29.
        assert [choice(1), choice(28), choice(29)] == [False, False, True]

    def test_the_walk_stops_where_accuracy_first_dips(self) -> None:
        # The surest 20 exits are wrong where the server is right, the others the other way round.
        p = sure_of(*np.linspace(0.9, 0.1, 200))
        labels = np.zeros(200, np.int64)
        labels[:20] = 1
        server = labels.copy()
        server[20:40] = 1
        curve = offload_curve(p, server, labels, "margin")
        assert for_accuracy(curve, 0.8).exits == 200
        assert for_accuracy(curve, 0.8, level=0.95).exits < 20

    def test_keeps_its_promise_on_data_it_has_not_seen(self) -> None:
        # The exit is right with its own p, the server always; the truth is known exactly: with
        # p uniform in (½, 1) and exits above p*, the accuracy is 1 − (1 − p*)².
        wanted, level, tries = 0.85, 0.9, 400
        broken = {None: 0, level: 0}
        rng = np.random.default_rng(0)
        for _ in range(tries):
            p = rng.uniform(0.5, 1, 100)
            labels = (rng.random(100) > p).astype(np.int64)
            curve = offload_curve(np.stack([p, 1 - p], axis=1), labels, labels, "margin")
            for asked in broken:
                choice = for_accuracy(curve, wanted, level=asked)
                surest = min(max(0.5, (1 + choice.threshold) / 2), 1.0)
                broken[asked] += choice.reached and 1 - (1 - surest) ** 2 < wanted
        assert broken[level] <= 0.13 * tries  # of 40 expected at most, by chance 52 in 1 of 50
        assert broken[None] > 0.3 * tries, "this test could not fail"

    @pytest.mark.parametrize("wanted", [-0.1, 1.01, math.nan])
    def test_out_of_range_is_refused(self, wanted: float) -> None:
        curve = offload_curve(sure_of(0.5), [0], [0])
        with pytest.raises(ExitRuleError, match="from 0 to 1"):
            for_accuracy(curve, wanted)
        with pytest.raises(ExitRuleError, match="from 0 to 1"):
            for_offload_rate(curve, wanted)

    @pytest.mark.parametrize("level", [0.0, 1.0, math.nan])
    def test_a_level_out_of_range_is_refused(self, level: float) -> None:
        curve = offload_curve(sure_of(0.5), [0], [0])
        with pytest.raises(ExitRuleError, match="between 0 and 1"):
            for_accuracy(curve, 0.5, level=level)
        with pytest.raises(ExitRuleError, match="between 0 and 1"):
            for_offload_rate(curve, 0.5, level=level)

    def test_one_sample(self) -> None:
        right = offload_curve(sure_of(0.5), [0], [0], "margin")
        assert for_accuracy(right, 1.0).threshold == ANSWER_ALL
        only_server = offload_curve(sure_of(0.5), [1], [1], "margin")
        assert for_accuracy(only_server, 1.0).threshold == OFFLOAD_ALL
        nobody = for_accuracy(offload_curve(sure_of(0.5), [0], [1], "margin"), 0.5)
        assert (nobody.reached, nobody.accuracy, nobody.offload_rate) == (False, 0, 0)

    def test_a_class_that_the_exit_never_gets_right_is_offloaded(self) -> None:
        # Class 2 looks like class 0, but a little less sure.
        p = np.array([[0.9, 0.1, 0.0]] * 5 + [[0.1, 0.9, 0.0]] * 5 + [[0.8, 0.1, 0.1]] * 5)
        labels = np.repeat([0, 1, 2], 5)
        choice = for_accuracy(offload_curve(p, labels, labels, "max_softmax"), 1.0)
        assert (choice.reached, choice.exits) == (True, 10)


class TestWantedOffloadRate:
    @given(data=held_out(), rule=st.sampled_from(RULES), wanted=shares)
    def test_is_used_as_far_as_ties_allow(
        self, data: HeldOut, rule: ExitRule, wanted: float
    ) -> None:
        choice = for_offload_rate(data.curve(rule), wanted)
        samples = len(data.labels)
        rates = [(samples - data.outcome(t, rule)[0]) / samples for t in data.thresholds(rule)]
        allowed = [rate for rate in rates if rate <= wanted]
        assert choice.reached == bool(allowed)
        assert choice.offload_rate == (max(allowed) if allowed else min(rates))
        assert (choice.exits, choice.correct) == data.outcome(choice.threshold, rule)

    @given(data=held_out(), wanted=shares)
    def test_labels_do_not_matter(self, data: HeldOut, wanted: float) -> None:
        other = HeldOut(data.probabilities, data.server, (data.labels + 1) % 3)
        one = for_offload_rate(data.curve(), wanted).threshold
        assert for_offload_rate(other.curve(), wanted).threshold == one

    @given(data=held_out(), wanted=shares, level=st.floats(0.51, 0.999))
    def test_a_promise_offloads_no_more(self, data: HeldOut, wanted: float, level: float) -> None:
        promised = for_offload_rate(data.curve(), wanted, level=level)
        plain = for_offload_rate(data.curve(), wanted)
        assert promised.offload_rate <= plain.offload_rate
        if promised.reached:
            offloads = promised.samples - promised.exits
            _, high = share_interval(offloads, promised.samples, 2 * level - 1)
            assert high <= wanted + 1e-9

    def test_all_and_nothing(self) -> None:
        curve = offload_curve(sure_of(0.1, 0.5), [0, 0], [0, 0])
        assert for_offload_rate(curve, 1.0).threshold == OFFLOAD_ALL
        assert for_offload_rate(curve, 0.0).threshold == ANSWER_ALL


class TestShareInterval:
    # Textbook values of Clopper and Pearson's interval at 95 %.
    @pytest.mark.parametrize(
        ("successes", "samples", "low", "high"),
        [(0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (1, 1, 0.025, 1.0)],
    )
    def test_has_the_known_values(
        self, successes: int, samples: int, low: float, high: float
    ) -> None:
        assert share_interval(successes, samples) == pytest.approx((low, high), abs=5e-5)

    @given(samples=st.integers(1, 60), share=st.floats(0, 1), level=st.floats(0.5, 0.99))
    def test_holds_the_true_share_as_often_as_it_says(
        self, samples: int, share: float, level: float
    ) -> None:
        chances = [
            math.comb(samples, k) * share**k * (1 - share) ** (samples - k)
            for k in range(samples + 1)
        ]
        held = 0.0
        for k, chance in enumerate(chances):
            low, high = share_interval(k, samples, level)
            held += chance * (low - 1e-12 <= share <= high + 1e-12)
        assert held >= level - 1e-9

    def test_large_counts_stay_exact(self) -> None:
        low, high = share_interval(90_000, 100_000)
        half = 1.96 * math.sqrt(0.9 * 0.1 / 100_000)
        assert (0.9 - low, high - 0.9) == pytest.approx((half, half), rel=0.01)

    @pytest.mark.parametrize(("successes", "samples"), [(-1, 3), (4, 3), (0, 0)])
    def test_counts_that_cannot_be_are_refused(self, successes: int, samples: int) -> None:
        with pytest.raises(ExitRuleError, match="number of samples"):
            share_interval(successes, samples)
