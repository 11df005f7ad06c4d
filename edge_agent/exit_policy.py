"""Which images a device answers by itself, and which it asks the coordinator about. Pure.

What the coordinator serves says from which confidence on an exit is sure (:class:`Policy`). On top
of that come the device's own limits (:class:`Limits`): how many requests and bytes an hour may
cost, and how long an answer may take. And a guard against drift: a sample of the images whose exit
is sure is offloaded all the same, so that a device notices when its exit no longer agrees with the
whole network as it did on held-out images; then it trusts it less.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from broker.serving_messages import Serving
from tensors.calibration import OFFLOAD_ALL
from tensors.exit_rules import ExitRule, exits

LONGEST_S = 600.0
"""No round trip is expected to take longer."""
PROBE_S = 30.0
"""While round trips take too long, one is tried so often: it may have become better. After one that
was back in time the next is tried at once: the expectation needs several to believe it."""

WINDOW = 200
"""Audited images that agreement is judged by."""
STEP = 16
"""Audited images from one judgement to the next."""
ALARM = 1e-3
"""Agreement has fallen if so little or less would come by chance with this probability."""
CALM = 0.2
"""It has recovered if that probability is at least this."""
TIGHTEST = 6
"""Each step of tightening halves what the threshold lacks to 1; there are so many."""
MOST_AGREEMENT = 0.99
"""Expected at most: held-out images are too few to promise that an exit always agrees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the coordinator serves for a cut: when its exit is sure, and how long to wait for it.

    ``agreement`` is the least expected share of sure images that the whole network answers alike;
    None if it was not measured: then nothing is judged. ``audit_share`` of the sure images are
    offloaded to see whether it is so.
    """

    rule: ExitRule
    threshold: float
    timeout_s: float
    audit_share: float = 0.0
    agreement: float | None = None


def policy_of(serving: Serving, cut: int) -> Policy | None:
    """What is served for a cut; None if its exit was never trained: then it answers nothing."""
    served = serving.cuts.get(str(cut))
    if served is None:
        return None
    return Policy(
        rule=serving.exit_rule,
        threshold=served.threshold,
        timeout_s=min(LONGEST_S, serving.offload_timeout_s),
        audit_share=serving.audit_share,
        agreement=served.agreement,
    )


def measuring_policy_of(serving: Serving, cut: int) -> Policy:
    """The same to measure a fleet with: without audits, and an untrained exit asks about all."""
    policy = policy_of(serving, cut)
    if policy is None:
        return Policy(
            rule=serving.exit_rule, threshold=OFFLOAD_ALL, timeout_s=serving.offload_timeout_s
        )
    return replace(policy, audit_share=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A device's own limits to offloading; None: there is none.

    ``requests_per_h`` messages and ``bytes_per_h`` of them are granted evenly, and at most those
    of ``burst_s`` seconds are kept for later. ``latency_s`` is how long an answer may take from
    the request on: nothing is offloaded that is not expected back by then.
    """

    requests_per_h: float | None = None
    bytes_per_h: float | None = None
    burst_s: float = 60.0
    latency_s: float | None = None


class TokenBucket:
    """Grants ``per_h`` tokens an hour and keeps those of ``burst_s`` seconds, or at least 1.

    It starts full. What is taken may exceed what is there, and is then saved up for: in any time
    at most the burst, the rate times that time and once the largest amount are taken.
    """

    def __init__(self, per_h: float, burst_s: float, clock: Callable[[], float]) -> None:
        self._per_s = per_h / 3600
        self._capacity = max(1.0, self._per_s * burst_s) if per_h > 0 else 0.0
        self._clock = clock
        self._tokens, self._at = self._capacity, clock()

    @property
    def tokens(self) -> float:
        """What may be taken now; below 0 if more was taken than there was."""
        now = self._clock()
        gained = max(0.0, now - self._at) * self._per_s
        self._tokens, self._at = min(self._capacity, self._tokens + gained), now
        return self._tokens

    def take(self, amount: float) -> None:
        """Take so much, even if it is not there."""
        self._tokens = self.tokens - amount


class RoundTrip:
    """How long a round trip takes at most, as TCP expects it (RFC 6298): mean and four deviations.

    One that did not come back doubles it, until the next that does.
    """

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0
        self.expected_s: float | None = None
        """None as long as nothing was measured."""

    def returned(self, seconds: float) -> None:
        """One took so long."""
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self._mean) - self._deviation) / 4
            self._mean += (seconds - self._mean) / 8
        self.expected_s = min(LONGEST_S, self._mean + 4 * self._deviation)

    def missed(self, waited_s: float) -> None:
        """One has not come back within that time."""
        doubled = 2 * (self.expected_s or 0.0)
        self.expected_s = min(LONGEST_S, max(doubled, waited_s))


@dataclass(frozen=True, slots=True)
class Drift:
    """Of the last ``audits`` audited images, ``agreed`` got the whole network's answer.

    ``chance`` is the probability of so few or fewer if the exit is as good as on held-out images
    (1 if nothing is known of that), ``level`` how many steps the threshold is tightened by.
    """

    audits: int
    agreed: int
    expected: float | None
    chance: float
    level: int

    @property
    def drifting(self) -> bool:
        """Whether the device trusts its exit less than it was told to."""
        return self.level > 0


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """For N images, bool (N,) each: the exit answers; it is audited; the answer would be late.

    An image that neither exits nor is late is to be offloaded, an audited one, too.
    """

    exits: NDArray[np.bool_]
    audits: NDArray[np.bool_]
    late: NDArray[np.bool_]


class ExitPolicy:
    """Decides for one device. ``seed`` chooses which sure images are audited.

    The audited are a sample of the images above the threshold that was served, whether or not a
    tightened one offloads them anyway: so what is measured does not depend on what follows from it.
    """

    def __init__(self, limits: Limits, *, seed: int, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._random = np.random.default_rng(seed)
        self._requests = _bucket(limits.requests_per_h, limits.burst_s, clock)
        self._bytes = _bucket(limits.bytes_per_h, limits.burst_s, clock)
        self._probe_due = -math.inf
        self._policy: Policy | None = None
        self._model: tuple[str, int] | None = None
        self._window: deque[bool] = deque(maxlen=WINDOW)
        self._unjudged = self._level = 0
        self.round_trip = RoundTrip()

    def use(self, policy: Policy, *, run: str, version: int) -> None:
        """Follow ``policy`` for this version of the parameters.

        What audits said of another version or threshold no longer counts, but within a run a
        tightened threshold stays so until audits of the new one say better.
        """
        before, model = self._policy, self._model
        self._policy, self._model = policy, (run, version)
        same = before is not None and before.threshold == policy.threshold
        if model != (run, version) or not same:
            self._window.clear()
            self._unjudged = 0
        judged = policy.agreement is not None and policy.audit_share > 0
        if (model and model[0]) != run or not judged:
            self._level = 0

    @property
    def policy(self) -> Policy:
        """What is followed."""
        assert self._policy is not None
        return self._policy

    @property
    def latency_s(self) -> float | None:
        """See :class:`Limits`."""
        return self._limits.latency_s

    @property
    def threshold_in_force(self) -> float:
        """τ for now: the served one, or nearer to 1 where the exit was found to drift."""
        served = self.policy.threshold
        return served + max(0.0, 1 - served) * (1 - 0.5**self._level)

    @property
    def drifting(self) -> bool:
        """Whether the threshold is tightened now."""
        return self._level > 0

    @property
    def drift(self) -> Drift:
        """What the audits say."""
        expected = None if self._policy is None else self._policy.agreement
        audits, agreed = len(self._window), sum(self._window)
        chance = 1.0 if expected is None else chance_of_at_most(agreed, audits, expected)
        return Drift(audits, agreed, expected, chance, self._level)

    def decide(self, confidence: NDArray[np.float64], elapsed_s: NDArray[np.float64]) -> Decision:
        """What to do about images of this confidence (N,), asked for so long ago (N,)."""
        policy = self.policy
        sure = exits(confidence, self.threshold_in_force)
        drawn = self._random.random(len(confidence)) < policy.audit_share
        audits = exits(confidence, policy.threshold) & drawn
        return Decision(sure, audits, self._late(elapsed_s, ~sure) & ~sure)

    def _late(self, elapsed_s: NDArray[np.float64], unsure: NDArray[np.bool_]) -> NDArray[np.bool_]:
        latency, expected = self._limits.latency_s, self.round_trip.expected_s
        if latency is None:
            return np.zeros(len(elapsed_s), np.bool_)
        hopeless: NDArray[np.bool_] = elapsed_s >= latency
        late: NDArray[np.bool_] = hopeless | (elapsed_s + (expected or 0.0) > latency)
        now = self._clock()
        if (late & ~hopeless & unsure).any() and now >= self._probe_due:
            self._probe_due = now + PROBE_S
            return hopeless
        return late

    def returned(self, seconds: float) -> None:
        """A round trip took so long."""
        self.round_trip.returned(seconds)
        if self._limits.latency_s is not None and seconds <= self._limits.latency_s:
            self._probe_due = self._clock()

    @property
    def affords(self) -> bool:
        """Whether one more message is within what an hour may cost."""
        requests, size = self._requests, self._bytes
        return (requests is None or requests.tokens >= 1) and (size is None or size.tokens > 0)

    def sent(self, size: int) -> None:
        """A message of so many bytes was offloaded."""
        if self._requests is not None:
            self._requests.take(1)
        if self._bytes is not None:
            self._bytes.take(size)

    def audited(self, *, agreed: bool) -> None:
        """The whole network gave the exit's answer to an audited image, or another one."""
        self._window.append(agreed)
        self._unjudged += 1
        if self._unjudged < STEP:
            return
        self._unjudged = 0
        drift = self.drift
        if drift.expected is None:
            return
        if drift.chance <= ALARM:
            self._level = min(TIGHTEST, self._level + 1)
        elif drift.chance >= CALM:
            self._level = max(0, self._level - 1)


def chance_of_at_most(successes: int, trials: int, probability: float) -> float:
    """P(X ≤ successes) of a binomial X: the exact one-sided test of too few.

    ``probability`` counts as at most :data:`MOST_AGREEMENT`.
    """
    p = min(probability, MOST_AGREEMENT)
    if p <= 0 or successes >= trials:
        return 1.0
    log_ways = math.lgamma(trials + 1) - math.lgamma(successes + 1)
    log_ways -= math.lgamma(trials - successes + 1)
    term = math.exp(log_ways + successes * math.log(p) + (trials - successes) * math.log1p(-p))
    total = term
    for k in range(successes, 0, -1):
        term *= k / (trials - k + 1) * ((1 - p) / p)
        total += term
    return min(1.0, total)


def _bucket(per_h: float | None, burst_s: float, clock: Callable[[], float]) -> TokenBucket | None:
    return None if per_h is None else TokenBucket(per_h, burst_s, clock)
