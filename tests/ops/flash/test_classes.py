from __future__ import annotations

import pytest

from ops.errors import SettingsWrong
from ops.flash.classes import CLASSES, device_class


def test_a_class_may_be_changed_for_a_device_that_is_another() -> None:
    found = device_class("pi4", python="3.11", engine="onnxruntime", machine="x86_64")
    assert found.python == (3, 11)
    assert found.extra == "lite"
    assert found.machine == "x86_64"
    assert found.label == CLASSES["pi4"].label


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "pi1"}, "pi4, zero2, generic"),
        ({"name": "pi4", "python": "2.7"}, "like 3.13"),
        ({"name": "pi4", "python": "3.10"}, "3.11 or newer"),
        ({"name": "pi4", "engine": "tpu"}, "torch, onnxruntime"),
        ({"name": "pi4", "machine": "armv7l"}, "aarch64 or x86_64"),
    ],
)
def test_what_there_is_none_of_is_refused(arguments: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsWrong, match=says):
        device_class(**arguments)
