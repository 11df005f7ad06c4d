"""Writes the test vectors: ``python -m tests.vectors.make`` from the root of the repository.

docs/protocol.md says what the files hold. The same every time, but for bytes inside zstd frames,
which depend on the version of that library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vectors.frames import frames
from tests.vectors.messages import messages
from tests.vectors.rejected import rejected
from tests.vectors.tensors import parameters, tensors

FOLDER = Path(__file__).parent
FAMILIES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "frames": frames,
    "messages": messages,
    "parameters": parameters,
    "rejected": rejected,
    "tensors": tensors,
}


def read(family: str) -> list[dict[str, Any]]:
    """The committed vectors of a family."""
    content = json.loads((FOLDER / f"{family}.json").read_text(encoding="utf-8"))
    vectors: list[dict[str, Any]] = content["vectors"]
    return vectors


def render(vectors: list[dict[str, Any]]) -> str:
    """The text of a file: one vector a line."""
    lines = [json.dumps(vector, ensure_ascii=False, allow_nan=False) for vector in vectors]
    return '{"vectors": [\n' + ",\n".join(lines) + "\n]}\n"


if __name__ == "__main__":
    for family, make in FAMILIES.items():
        (FOLDER / f"{family}.json").write_text(render(make()), encoding="utf-8")
