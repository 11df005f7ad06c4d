"""Which subscription filters match a topic, and which topics a filter, without trying them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Node(Generic[T]):
    __slots__ = ("children", "value")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.value: T | None = None


class Tree(Generic[T]):
    """Values at slash-separated paths; ``matching`` and ``matched`` agree with ``topics.matches``.

    The paths are filters (then ask with a topic) or topics (then ask with a filter).
    """

    def __init__(self) -> None:
        self._root = _Node[T]()

    def get(self, path: str) -> T | None:
        """The value at exactly this path."""
        node = self._root
        for level in path.split("/"):
            child = node.children.get(level)
            if child is None:
                return None
            node = child
        return node.value

    def put(self, path: str, value: T | None) -> None:
        """Set the value at a path; None takes it away."""
        node = self._root
        for level in path.split("/"):
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Node[T]()
            node = child
        node.value = value

    def matching(self, topic: str) -> list[T]:
        """Values at the filters that match ``topic``."""
        found: list[T] = []
        nodes = [self._root]
        levels = topic.split("/")
        for depth, level in enumerate(levels):
            following = []
            for node in nodes:
                hidden = depth == 0 and level.startswith("$")
                _take(node.children.get("#") if not hidden else None, found)
                for key in (level,) if hidden else (level, "+"):
                    child = node.children.get(key)
                    if child is not None:
                        following.append(child)
            nodes = following
        for node in nodes:
            _take(node, found)
            _take(node.children.get("#"), found)  # "a/#" matches "a" too
        return found

    def matched(self, topic_filter: str) -> list[T]:
        """Values at the topics that ``topic_filter`` matches, in the order of their making."""
        return list(_walk(self._root, topic_filter.split("/"), 0))


def _take(node: _Node[T] | None, found: list[T]) -> None:
    if node is not None and node.value is not None:
        found.append(node.value)


def _walk(node: _Node[T], levels: list[str], depth: int) -> Iterator[T]:
    if depth == len(levels):
        if node.value is not None:
            yield node.value
        return
    level = levels[depth]
    if level == "#" and node.value is not None:
        yield node.value
    if level not in ("#", "+"):
        if (child := node.children.get(level)) is not None:
            yield from _walk(child, levels, depth + 1)
        return
    for name, child in node.children.items():
        if depth == 0 and name.startswith("$"):
            continue
        if level == "+":
            yield from _walk(child, levels, depth + 1)
        else:
            yield from _everything(child)


def _everything(node: _Node[T]) -> Iterator[T]:
    if node.value is not None:
        yield node.value
    for child in node.children.values():
        yield from _everything(child)
