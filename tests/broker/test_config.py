from __future__ import annotations

from pathlib import Path

import pytest

from broker.config import BrokerConfig, load_settings
from broker.errors import ConfigError


def load(tmp_path: Path, toml: str = "", **variables: str) -> BrokerConfig:
    file = tmp_path / "splitfleet.toml"
    file.write_text(toml)
    environ = {f"SPLITFLEET_BROKER_{key}": value for key, value in variables.items()}
    return load_settings(BrokerConfig, section="broker", file=file, environ=environ)


def test_without_anything_the_defaults_hold() -> None:
    assert load_settings(BrokerConfig, section="broker") == BrokerConfig()


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "splitfleet.toml"
    file.write_text("[broker]\nkeepalive_s = 10\nreceive_maximum = 10\nsession_expiry_s = 10\n")
    config = load_settings(
        BrokerConfig,
        section="broker",
        file=file,
        environ={"SPLITFLEET_BROKER_KEEPALIVE_S": "20", "SPLITFLEET_BROKER_RECEIVE_MAXIMUM": "20"},
        flags={"keepalive_s": 30, "session_expiry_s": None},
    )
    assert (config.keepalive_s, config.receive_maximum, config.session_expiry_s) == (30, 20, 10)


def test_other_sections_and_variables_do_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "splitfleet.toml"
    file.write_text("[agent]\nname = 'd1'\n")
    config = load_settings(
        BrokerConfig, section="broker", file=file, environ={"SPLITFLEET_AGENT_NAME": "d2"}
    )
    assert config == BrokerConfig()


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("[broker]\nkeepalive_s = 1", ["broker.keepalive_s", "= 1", "splitfleet.toml", "5"]),
        ("[broker]\nkeep_alive = 1", ["broker.keep_alive", "not a setting", "keepalive_s"]),
        ("[broker]\nurl = 'http://x'", ["broker.url", "'http://x'", "mqtt://HOST"]),
        ("[broker]\nurl = 'mqtt://a:b@x'", ["username and password"]),
        ("[broker]\nurl = 'mqtt://x:99999'", ["broker.url", "99999"]),
        ("[broker]\nca_file = 'ca.pem'", ["mqtts://"]),
        ("[broker]\nurl = 'mqtts://x'\ncert_file = 'c.pem'", ["key_file", "together"]),
        ("[broker]\nbackoff_initial_s = 60.0", ["backoff_max_s"]),
        ("[broker]\nconnect_timeout_s = inf", ["broker.connect_timeout_s", "finite"]),
        ("broker = 1", ["[broker]"]),
        ("[broker", ["splitfleet.toml", "TOML"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(
    tmp_path: Path, toml: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value).replace(str(tmp_path), "")


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'soon'.*SPLITFLEET_BROKER_KEEPALIVE_S.*integer"):
        load(tmp_path, KEEPALIVE_S="soon")
    with pytest.raises(ConfigError, match=r"SPLITFLEET_BROKER_URLL.*not a setting.*url"):
        load(tmp_path, URLL="mqtt://x")


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(ConfigError, match=r"broker\.keepalive_s = 0 .*--keepalive-s"):
        load_settings(BrokerConfig, section="broker", flags={"keepalive_s": 0})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml.*No such file"):
        load_settings(BrokerConfig, section="broker", file=tmp_path / "nowhere.toml")


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    config = load(tmp_path, USERNAME="d1", PASSWORD="hunter2")
    assert "hunter2" not in repr(config)
    with pytest.raises(ConfigError) as caught:
        load_settings(BrokerConfig, section="broker", flags={"password": ["hunter2"]})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match="username") as caught:
        load_settings(BrokerConfig, section="broker", flags={"password": "hunter2"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://broker.example", "broker.example", 1883, False),
        ("mqtts://broker.example/", "broker.example", 8883, True),
        ("mqtt://[::1]:2000", "::1", 2000, False),
    ],
)
def test_a_url_gives_host_port_and_tls(url: str, host: str, port: int, tls: bool) -> None:
    config = BrokerConfig(url=url)
    assert (config.host, config.port, config.tls) == (host, port, tls)
