"""docs/protocol.md names every topic, field, default and reason that the code knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from broker.frames import SLOWEST, Limits
from broker.messages import KINDS, LOSSY, PROTOCOL
from broker.topics import RETAINED
from tensors.codecs import parse_codec
from tensors.format import VERSION
from tests.protocol.test_vectors import submodels

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
PLACES = sorted(KINDS)


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows in a text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]


def section(title: str) -> str:
    """The text under a heading that names this, up to the next heading."""
    (found,) = re.findall(
        rf"^#+ [^\n]*{title}\b[^\n]*\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL
    )
    return str(found)


def field_rows(text: str) -> dict[str, str]:
    """Field → what it is when absent, of the first table in a text."""
    table = text[text.index("| field |") :].split("\n\n", 1)[0]
    return {cells[0].strip("`"): cells[2].strip("`") for cells in rows(table)[1:]}


def absent(value: Any) -> str:
    """How the document writes a default."""
    if value is None:
        return "none"
    return "empty" if value == b"" else json.dumps(value)


def expected(model: type[BaseModel]) -> dict[str, str]:
    return {
        name: "req" if field.is_required() else absent(field.get_default(call_default_factory=True))
        for name, field in model.model_fields.items()
    }


@pytest.mark.parametrize("place", PLACES, ids="/".join)
def test_the_fields_of_a_message_are_listed_in_order(place: tuple[str, str]) -> None:
    model, text = KINDS[place], section("/".join(place))
    listed = field_rows(text)
    assert list(listed) == list(model.model_fields)
    assert listed == expected(model)
    for name, inner in submodels(model).items():
        listed = field_rows(text[text.index(f"`{name}`", text.index("\n\n`")) :])
        assert list(listed) == list(inner.model_fields), name
        defaults = {key: value.strip('"') for key, value in expected(inner).items()}
        assert listed == defaults, name


def test_topics_with_their_quality_and_retention() -> None:
    listed = {}
    for cells in rows(section("Topics")):
        if re.fullmatch(r"`(up|down|all|cut)/[a-z]+`", cells[0]):
            place = tuple(cells[0].strip("`").split("/"))
            listed[place] = (int(cells[2]), cells[3] == "yes")
    assert listed == {place: (int(place not in LOSSY), place in RETAINED) for place in KINDS}


def test_versions_and_limits() -> None:
    assert f"Message and frame version **{PROTOCOL}**, tensor format version **{VERSION}**" in TEXT
    limits = {cells[0]: cells[1] for cells in rows(section("Frames")) if len(cells) == 3}
    known, mib = Limits(), 2**20
    assert limits["bytes of one message"] == f"{known.message_bytes // mib} MiB"
    assert limits["unfinished messages of one sender"] == str(known.sender_messages)
    assert limits["reserved bytes of one sender"] == f"{known.sender_bytes // mib} MiB"
    assert limits["reserved bytes in all"] == f"{known.total_bytes // 2**30} GiB"
    assert f"nothing new has come for {known.timeout_s:g} s" in TEXT
    assert f"{SLOWEST * known.timeout_s / 60:g} min after its first frame" in TEXT


def reasons() -> set[str]:
    """Reasons to refuse bytes: the first two tables of the section."""
    tables = section("Reasons").split("\n\n| reason |")[1:3]
    listed = [rows("| reason |" + table)[1:] for table in tables]
    return {
        name for table in listed for cells in table for name in re.findall(r"`(\w+)`", cells[0])
    }


def test_codecs_that_are_named_exist() -> None:
    for name in ("fp32", "fp16+zstd", "bf16", "int2", "int8+channel+stochastic+zstd:19", "levels3"):
        assert parse_codec(name).name == name
