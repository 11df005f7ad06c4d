"""Fleets drawn from distributions."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from ops.errors import SettingsWrong
from ops.simulator import LinkProfile, World
from ops.simulator.link import Pipe
from ops.simulator.profile import Choice, Constant, LogNormal, Uniform, bundled, load_profile


def write(folder: Path, text: str) -> str:
    path = folder / "profile.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", bundled())
def test_bundled_profiles_make_fleets(name: str) -> None:
    devices = load_profile(name).devices(200, World(1))
    assert [device.name for device in devices[:2]] == ["d000", "d001"]
    assert len({device.cost.forward_s for device in devices}) > 50
    for device in devices:
        assert device.cut == "auto" or 1 <= device.cut <= 9
        assert device.link.up_bytes_per_s > 0
        assert 0 <= device.link.loss < 1


def test_there_are_bundled_profiles() -> None:
    assert bundled() == ["cellular", "home", "lan", "mixed"]


def test_one_more_device_changes_no_other() -> None:
    profile = load_profile("mixed")
    few, more = profile.devices(90, World(1)), profile.devices(91, World(1))
    assert more[:90] == few
    assert profile.devices(90, World(2)) != few


def test_groups_have_their_shares(tmp_path: Path) -> None:
    profile = load_profile(
        write(tmp_path, "[[group]]\nshare=3\ncut=2\n[[group]]\nshare=1\ncut='auto'\n")
    )
    assert Counter(d.cut for d in profile.devices(40, World())) == {2: 30, "auto": 10}
    assert Counter(d.cut for d in profile.devices(4, World())) == {2: 3, "auto": 1}


def test_distributions(rng: random.Random) -> None:
    assert Constant(constant=3.0).draw(rng) == 3.0
    assert all(2 <= Uniform(uniform=(2, 4)).draw(rng) <= 4 for _ in range(100))
    drawn = sorted(LogNormal(lognormal=5.0, sigma=0.5).draw(rng) for _ in range(2001))
    assert 4.0 < drawn[1000] < 6.2
    assert max(LogNormal(lognormal=5, sigma=2, at_most=6).draw(rng) for _ in range(200)) == 6
    counts = Counter(Choice(choice=[1, 2, 3], weights=[1, 0, 3]).draw(rng) for _ in range(400))
    assert counts[2] == 0
    assert counts[3] > counts[1] > 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[[group]]\nspeed = 3\n", r"group.0.speed = 3: Extra inputs"),
        ("[[group]]\nforward_s = { normal = 3 }\n", r"group.0.forward_s = .*constant, uniform"),
        ("[[group]]\ncut = { choice = [1, 2], weights = [1] }\n", r"group.0.cut.*2 choices but 1"),
        ("[[group]]\nlatency_s = { uniform = [2, 1] }\n", r"group.0.latency_s.*not be above"),
        ("[[group]]\nshare = 0\n", r"group.0.share = 0: .*greater than 0"),
        ("[[group]]\nforward_s = nan\n", r"forward_s = nan: allowed is 0 to 3600"),
        ('[[group]]\nlatency_s = "auto"\n', r"latency_s = auto: it must be a number"),
        ("[[group]]\ncut = 2.7\n", r"cut = 2.7: it must be a whole number"),
        ("[[group]]\ncut = { choice = [2, 0] }\n", r"cut = 0.0: allowed is 1 to 1024"),
        ("[[group]]\njitter_s = { uniform = [0, inf] }\n", r"jitter_s.uniform.1 = inf: .*finite"),
        ("[[group]]\nmemory_mb = { uniform = [0, inf] }\n", r"memory_mb.uniform.1 = inf: .*finite"),
        ("[[group]]\nmemory_mb = inf\n", r"memory_mb = inf: allowed is 0 to 1e\+09"),
        ("[[group]]\nmemory_mb = { choice = [1, nan] }\n", r"memory_mb.choice.1 = nan: .*finite"),
        (
            "[[group]]\nup_bytes_per_s = { lognormal = inf, sigma = 1 }\n",
            r"up_bytes_per_s.lognormal = inf: .*finite",
        ),
        (
            "[[group]]\nforward_s = { lognormal = 0.01, sigma = 1000 }\n",
            r"forward_s.sigma = 1000: .*less than or equal to 10",
        ),
        (
            "[[group]]\nforward_s = { lognormal = 0.01, sigma = nan }\n",
            r"forward_s.sigma = nan: .*10",
        ),
        (
            "[[group]]\ncut = { choice = [2, 3], weights = [inf, 1] }\n",
            r"group.0.cut.weights.0 = inf: .*less than or equal to 1000000000",
        ),
        ("[[group]]\nshare = inf\n", r"group.0.share = inf: .*less than or equal to 1000000000"),
        ("[[group]]\nshare = nan\n", r"group.0.share = nan"),
        ("[[group]]\nforward_s = 1" + 400 * "0", r"group.0.forward_s.* = 10+\.\.\.0+: "),
        ("[[group]]\nforward_s = 1" + 5000 * "0", r"cannot be read: .*digits"),
        ("[[group]]\nforward_s = " + 9999 * "[" + 9999 * "]", r"cannot be read: nested too deeply"),
        ("[[group]]\nloss = 0.91\n", r"loss = 0.91: allowed is 0 to 0.9"),
        (
            "[[group]]\n[server]\nup_bytes_per_s = 1e-300\n",
            r"server.up_bytes_per_s = 1e-300: .*greater than or equal to 1",
        ),
        ("[[group]]\n[server]\nstep_s = 1e300\n", r"server.step_s = 1e\+300: .*3600"),
        ("[[group]]\n[server]\nmemory_mb = nan\n", r"server.memory_mb = nan"),
        ("group = []\n", r"group = \[\]: .*at least 1"),
        ("group = [", r"cannot be read"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(SettingsWrong, match=wanted) as caught:
        load_profile(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_the_widest_distributions_stay_within_what_is_allowed(tmp_path: Path) -> None:
    profile = load_profile(
        write(
            tmp_path,
            "[[group]]\nup_bytes_per_s = inf\n"
            "forward_s = { lognormal = 3600, sigma = 10 }\n"
            "memory_mb = { lognormal = 1e9, sigma = 10 }\n",
        )
    )
    for device in profile.devices(200, World(1)):
        assert 0 < device.cost.forward_s <= 3600
        assert 0 < device.memory_mb <= 1e9


@pytest.mark.parametrize("loss", [0.1, 0.5, 0.6])
def test_packets_are_as_late_on_average_as_is_said(loss: float) -> None:
    world, profile = World(), LinkProfile(latency_s=0.05, loss=loss)
    arrived: list[float] = []
    rng = random.Random(1)
    for _ in range(20_000):
        pipe = Pipe[int](world, profile, 1e12, rng, lambda _: arrived.append(world.now))
        pipe.send(1, 0)
    world.run()
    assert fmean(arrived) == pytest.approx(profile.mean_delay_s, rel=0.1)


@pytest.mark.parametrize("loss", [0.0, 0.45, 0.5, 0.9])
@pytest.mark.parametrize("latency_s", [0.0, 60.0])
def test_the_mean_delay_is_finite_whatever_is_lost(loss: float, latency_s: float) -> None:
    assert latency_s <= LinkProfile(latency_s=latency_s, loss=loss).mean_delay_s < 1500


def test_a_profile_that_does_not_exist() -> None:
    with pytest.raises(SettingsWrong, match="give a file, or one of cellular, home, lan, mixed"):
        load_profile("nowhere")
