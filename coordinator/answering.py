"""What waits to be answered: admission, whose turn it is, and which questions go together.

Pure: no network, no thread, no torch; the clock is passed in. A question that is admitted is later
either taken to be computed or refused, never both and never neither.

Devices take turns by images: next is who has had the fewest since it began to wait (start-time fair
queueing: Goyal et al., SIGCOMM 1996, with every device of the same weight). Of one device the
newest question is first: if there is more than fits into one batch, answers to old questions are
worth the least.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from broker.telemetry import RefusalReason
from tensors.format import Encoded


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """Features of ``images`` images at ``cut``, as ``device`` sent them.

    ``arrived`` and ``deadline`` are times on the queue's clock, in seconds.
    """

    device: str
    request: int
    version: int
    cut: int
    images: int
    tensor: Encoded
    arrived: float
    deadline: float


@dataclass(frozen=True, slots=True, eq=False)
class Refusal:
    """A question that is not answered, and why."""

    question: Question
    reason: RefusalReason


class Pace:
    """How long batches take, as measured: a + b·images seconds, by least squares.

    An observation counts ``decay`` times as much as the one after it. As long as all batches had
    about the same size, proportional to the images.
    """

    def __init__(self, *, decay: float = 0.9) -> None:
        self._decay = decay
        self._count = self._n = self._t = self._nn = self._nt = 0.0

    def measured(self, images: int, seconds: float) -> None:
        """A batch of so many images took so long."""
        sums = (self._count, self._n, self._t, self._nn, self._nt)
        new = (1.0, images, seconds, images * images, images * seconds)
        self._count, self._n, self._t, self._nn, self._nt = (
            self._decay * old + more for old, more in zip(sums, new, strict=True)
        )

    def seconds(self, images: int, *, batch: int) -> float:
        """What so many images will take in batches of ``batch``; 0 before anything is measured."""
        if not self._count or not images:
            return 0.0
        start, each = self._fit()
        return start * math.ceil(images / batch) + each * images

    def _fit(self) -> tuple[float, float]:
        n, t = self._n / self._count, self._t / self._count
        spread = self._nn / self._count - n * n
        if spread < 0.01 * n * n:
            return 0.0, t / n
        each = min(max(0.0, (self._nt / self._count - n * t) / spread), t / n)
        return t - each * n, each


@dataclass(slots=True)
class _Line:
    """What waits of one device, oldest first, and the images it has had by the common count."""

    turn: float
    questions: deque[Question] = field(default_factory=deque)
    images: int = 0


class Waiting:
    """The questions that wait.

    ``batch_images`` are answered together at most (but a single question always), ``queue_images``
    wait at most; a question must not have more than those. One that finds the machine idle waits
    ``wait_s`` seconds for company.
    """

    def __init__(
        self, *, batch_images: int, queue_images: int, wait_s: float, clock: Callable[[], float]
    ) -> None:
        self._batch_images = batch_images
        self._queue_images = queue_images
        self._wait_s = wait_s
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._turn = 0.0
        self._due: float | None = None
        self.images = 0
        """How many wait."""
        self.pace = Pace()

    def __len__(self) -> int:
        """How many questions wait."""
        return sum(len(line.questions) for line in self._lines.values())

    @property
    def due(self) -> float | None:
        """When :meth:`take` should be called; None if nothing waits."""
        return self._due

    @property
    def ready(self) -> bool:
        """Whether :meth:`take` should be called now."""
        return self._due is not None and self._clock() >= self._due

    def admit(self, question: Question) -> list[Refusal]:
        """Let a question wait; who is refused for it, which may be itself.

        Refused as ``overloaded`` is a question that would not be answered before its deadline, by
        the pace measured and who is before it; never the only one, or nothing would be measured
        again. In a full queue the device with the most images loses its oldest question.
        """
        assert question.images <= self._queue_images
        now = self._clock()
        if self._lines:
            ahead = self._ahead(question) + question.images
            if now + self.pace.seconds(ahead, batch=self._batch_images) > question.deadline:
                return [Refusal(question, "overloaded")]
        refused = list(self._make_room(question))
        line = self._lines.setdefault(question.device, _Line(self._turn))
        line.questions.append(question)
        line.images += question.images
        self.images += question.images
        if self.images >= self._batch_images:
            self._due = now
        elif self._due is None:
            self._due = now + self._wait_s
        return refused

    def take(self) -> tuple[list[Question], list[Refusal]]:
        """The next batch, all of one version, and what has waited for too long.

        The batch is empty only if nothing is left that waits.
        """
        now = self._clock()
        refused = [Refusal(question, "expired") for question in self._expire(now)]
        batch = list(self._next_batch())
        self._due = now if self._lines else None
        return batch, refused

    # -- whose turn it is -------------------------------------------------------------------------

    def _next_batch(self) -> Iterator[Question]:
        room = self._batch_images
        version: int | None = None
        turns = [(line.turn, index, name) for index, (name, line) in enumerate(self._lines.items())]
        heapq.heapify(turns)
        while turns and room > 0:
            turn, index, name = heapq.heappop(turns)
            line = self._lines[name]
            question = line.questions[-1]
            if version is not None and (question.version != version or question.images > room):
                continue  # it keeps its turn, and is before the others in the next batch
            version = question.version
            self._turn = max(self._turn, turn)
            line.turn += question.images
            room -= question.images
            self._forget(name, line, line.questions.pop())
            if line.questions:
                heapq.heappush(turns, (line.turn, index, name))
            yield question

    def _ahead(self, question: Question) -> int:
        """Images of others that are before a new question, if nothing else comes."""
        own = self._lines.get(question.device)
        turn = self._turn if own is None else own.turn
        ahead = 0
        for name, line in self._lines.items():
            if name != question.device and line.turn <= turn:
                lead = line.questions[-1].images
                ahead += min(line.images, int(turn - line.turn) + lead)
        return ahead

    # -- the bounds -------------------------------------------------------------------------------

    def _make_room(self, question: Question) -> Iterator[Refusal]:
        while self.images + question.images > self._queue_images:
            waiting = {name: line.images for name, line in self._lines.items()}
            waiting[question.device] = waiting.get(question.device, 0) + question.images
            greediest = max(waiting, key=lambda name: (waiting[name], name == question.device))
            line = self._lines.get(greediest)
            if line is None:  # a single large question must not be shut out by many small ones
                greediest = max(self._lines, key=lambda name: self._lines[name].images)
                line = self._lines[greediest]
            oldest = line.questions.popleft()
            self._forget(greediest, line, oldest)
            yield Refusal(oldest, "overloaded")

    def _expire(self, now: float) -> list[Question]:
        late = [
            question
            for line in self._lines.values()
            for question in line.questions
            if question.deadline <= now
        ]
        for question in late:
            line = self._lines[question.device]
            line.questions.remove(question)
            self._forget(question.device, line, question)
        return late

    def _forget(self, name: str, line: _Line, question: Question) -> None:
        line.images -= question.images
        self.images -= question.images
        if not line.questions:
            del self._lines[name]
