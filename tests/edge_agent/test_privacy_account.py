from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import StateError
from edge_agent.privacy_account import FILE, PrivacyAccount, read_summary

A, B, C = b"a", b"b", b"c"


def test_releases_of_an_image_add_up(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path)
    for _ in range(3):
        assert account.charge([A, B], 0.5).all()
    account.charge([A], 0.25)
    assert (account.spent(A), account.spent(B), account.spent(C)) == (1.75, 1.5, 0.0)
    found = account.summary()
    assert (found.images, found.releases, found.rho_max, found.rho_median) == (2, 7, 1.75, 1.75)


def test_the_same_image_twice_in_a_batch_is_released_twice() -> None:
    account = PrivacyAccount(None, budget=1.0)
    assert account.charge([A, A, A], 0.4).tolist() == [True, True, False]
    assert account.spent(A) == 0.8


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    first = PrivacyAccount(tmp_path, budget=1.0)
    first.charge([A], 0.75)
    since = first.summary().since
    first.close()
    second = PrivacyAccount(tmp_path, budget=1.0)
    assert second.charge([A, B], 0.5).tolist() == [False, True]
    assert second.summary().since == since


def test_what_was_booked_survives_a_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from edge_agent.privacy_account import PrivacyAccount\n"
        "account = PrivacyAccount(pathlib.Path(sys.argv[1]))\n"
        "account.charge([b'a', b'b'], 0.5)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], timeout=250, check=False, env={**os.environ}
    )
    assert done.returncode == -9
    assert PrivacyAccount(tmp_path).spent(B) == 0.5


def test_without_noise_an_image_is_released_for_good() -> None:
    account = PrivacyAccount(None, budget=3.0)
    account.charge([A, B], 1.0)
    free = PrivacyAccount(None)
    free.charge([A], math.inf)
    free.charge([A], 1.0)
    assert free.summary().without_noise == 1
    assert free.summary().rho_max == math.inf
    assert not account.charge([A], math.inf).any()


def test_exhausted_are_those_that_another_release_would_bring_over_the_budget() -> None:
    account = PrivacyAccount(None, budget=1.0)
    account.charge([A, A, B], 0.4)
    assert account.summary(0.4).exhausted == 1
    assert account.summary(0.1).exhausted == 0
    assert account.summary(0.7).exhausted == 2


def test_two_machines_keep_one_account_and_one_budget(tmp_path: Path) -> None:
    allowed: Counter[bool] = Counter()
    accounts = [PrivacyAccount(tmp_path, budget=10.0) for _ in range(2)]

    def spend(account: PrivacyAccount) -> None:
        for _ in range(10):
            allowed[bool(account.charge([A], 1.0)[0])] += 1

    threads = [threading.Thread(target=spend, args=(account,)) for account in accounts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accounts[0].spent(A) == accounts[1].spent(A) == 10.0
    assert allowed[True] == 10


def test_a_full_account_takes_no_new_image_and_keeps_its_old_ones(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path, most_images=2)
    assert account.charge([A, B, C, A], 1.0).tolist() == [True, True, False, True]
    account.close()
    assert PrivacyAccount(tmp_path, most_images=2).charge([C, B], 1.0).tolist() == [False, True]


def test_a_disk_that_is_full_releases_nothing_and_half_a_batch_is_not_booked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    account = PrivacyAccount(tmp_path)
    account.charge([A], 1.0)
    pages = account._file.execute("PRAGMA page_count").fetchone()[0]
    account._file.execute(f"PRAGMA max_page_count = {pages}")
    keys = [f"{number:016d}".encode() for number in range(2000)]
    assert not account.charge(keys, 1.0).any()
    assert "nothing is released that cannot be booked" in caplog.text
    assert account.summary().images == 1
    assert account.charge([A], 1.0).all()


def test_another_process_that_holds_the_account_releases_nothing_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.privacy_account._BUSY_S", 0.01)
    account = PrivacyAccount(tmp_path)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert not account.charge([A], 1.0).any()
    other.execute("ROLLBACK")
    assert account.charge([A], 1.0).all()


def rubbish(path: Path) -> None:
    path.write_bytes(b"no database at all, but long enough to be one" * 50)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_to_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1])


def cut_to_a_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_releases(path: Path) -> None:
    change(path, "DROP TABLE images")


def without_its_beginning(path: Path) -> None:
    change(path, "DELETE FROM about")


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(statement)


@pytest.mark.parametrize(
    "damage",
    [
        rubbish,
        emptied,
        cut_to_a_byte,
        cut_to_a_page,
        folder_in_its_place,
        without_releases,
        without_its_beginning,
    ],
)
def test_a_damaged_account_is_not_begun_anew(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    account = PrivacyAccount(tmp_path)
    account.charge([A], 1.0)
    account.close()
    damage(tmp_path / FILE)
    for _ in range(2):
        with pytest.raises(StateError, match="without the account"):
            PrivacyAccount(tmp_path)


def test_an_account_that_is_damaged_further_in_is_said_and_releases_nothing(
    tmp_path: Path,
) -> None:
    keys = [f"{number:016d}".encode() for number in range(2000)]
    account = PrivacyAccount(tmp_path)
    account.charge(keys, 1.0)
    account.close()
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-4096] + bytes(4096))
    account = PrivacyAccount(tmp_path)
    assert not account.charge(keys, 1.0).any()
    with pytest.raises(StateError, match="cannot be read"):
        account.summary()
    with pytest.raises(StateError, match="cannot be read"):
        account.spent(keys[-1])


def test_of_two_that_begin_it_at_once_one_does(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        accounts = list(pool.map(lambda _: PrivacyAccount(tmp_path, budget=1.0), range(8)))
        released = list(pool.map(lambda account: account.charge([A], 1.0), accounts))
    assert sum(bool(allowed.all()) for allowed in released) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "nothing is left behind"


def test_an_account_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path)
    account._file.execute("UPDATE about SET value = '2' WHERE name = 'layout'")
    account.close()
    with pytest.raises(StateError, match="later version"):
        PrivacyAccount(tmp_path)


def test_where_there_is_no_account_none_is_made_by_looking(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no account of releases"):
        read_summary(tmp_path)
    assert not list(tmp_path.iterdir())


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([A, B, C]), max_size=4), st.floats(0.01, 2)), max_size=12
    )
)
def test_it_never_falls_and_never_exceeds_the_budget(
    charges: list[tuple[list[bytes], float]],
) -> None:
    account, expected = PrivacyAccount(None, budget=3.0), Counter[bytes]()
    for keys, rho in charges:
        before = {key: account.spent(key) for key in (A, B, C)}
        allowed = account.charge(keys, rho)
        for key, may in zip(keys, allowed, strict=True):
            expected[key] += rho if may else 0  # type: ignore[assignment]
        for key, spent in before.items():
            assert spent <= account.spent(key) <= 3.0
            assert account.spent(key) == pytest.approx(expected[key])
    account.close()
