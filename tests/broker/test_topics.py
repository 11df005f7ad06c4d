from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import TopicError
from broker.topics import (
    ALL_KINDS,
    CLAIM_DOWN_KINDS,
    CLAIM_UP_KINDS,
    CUT_KINDS,
    DOWN_KINDS,
    RESERVED,
    UP_KINDS,
    Address,
    Grant,
    Topics,
    matches,
)

TOPICS = Topics("lab")

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True).filter(lambda n: n not in RESERVED)
addresses = st.one_of(
    st.builds(
        lambda device, kind: Address("device", kind, device=device, direction="up"),
        names,
        st.sampled_from(sorted(UP_KINDS)),
    ),
    st.builds(
        lambda device, kind: Address("device", kind, device=device, direction="down"),
        names,
        st.sampled_from(sorted(DOWN_KINDS)),
    ),
    st.builds(
        lambda claim, kind: Address("claim", kind, device=claim, direction="up"),
        st.from_regex(r"(claim|back)\.[A-Za-z0-9_-]{1,64}", fullmatch=True),
        st.sampled_from(sorted(CLAIM_UP_KINDS)),
    ),
    st.builds(
        lambda claim, kind: Address("claim", kind, device=claim, direction="down"),
        st.from_regex(r"(claim|back)\.[A-Za-z0-9_-]{1,64}", fullmatch=True),
        st.sampled_from(sorted(CLAIM_DOWN_KINDS)),
    ),
    st.builds(lambda kind: Address("all", kind), st.sampled_from(sorted(ALL_KINDS))),
    st.builds(
        lambda layer, kind: Address("cut", kind, layer=layer),
        st.integers(0, 9999),
        st.sampled_from(sorted(CUT_KINDS)),
    ),
)


@given(names, addresses)
def test_what_is_written_is_read_back(fleet: str, address: Address) -> None:
    topics = Topics(fleet)
    assert topics.parse(topics.format(address)) == address


@given(st.text())
def test_any_text_is_an_address_or_a_topic_error(topic: str) -> None:
    try:
        address = TOPICS.parse(topic)
    except TopicError:
        return
    assert TOPICS.format(address) == topic


@given(
    st.lists(st.sampled_from(["splitfleet", "lab", "device", "d1", "up", "all", "cut", "3", ""]))
)
def test_any_path_of_known_words_is_an_address_or_a_topic_error(words: list[str]) -> None:
    topic = "/".join(words)
    try:
        address = TOPICS.parse(topic)
    except TopicError:
        return
    assert TOPICS.format(address) == topic


def test_topics_are_those_of_the_protocol() -> None:
    assert TOPICS.up("d1", "activations") == "splitfleet/lab/device/d1/up/activations"
    assert TOPICS.down("d1", "gradients") == "splitfleet/lab/device/d1/down/gradients"
    assert TOPICS.all("round") == "splitfleet/lab/all/round"
    assert TOPICS.cut(3, "manifest") == "splitfleet/lab/cut/3/manifest"


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "splitfleet",
        "splitfleet/other/all/round",
        "splitfleet/lab/all/activations",
        "splitfleet/lab/all/round/",
        "splitfleet/lab/cut/03/manifest",
        "splitfleet/lab/cut/-1/manifest",
        "splitfleet/lab/cut/٣/manifest",
        "splitfleet/lab/device/d1/up/receipt",
        "splitfleet/lab/device/d1/down/activations",
        "splitfleet/lab/device/coordinator/up/status",
        "splitfleet/lab/device/a b/up/status",
        "splitfleet/lab/device//up/status",
        "splitfleet/lab/device/+/up/status",
        "splitfleet/lab/device/d1\n/up/status",
        "splitfleet/lab/device/claim.d1/up/status",
        "splitfleet/lab/device/d1/up/enrol",
        "splitfleet/lab/claim/d1/up/enrol",
        "splitfleet/lab/claim/claim./up/enrol",
        "splitfleet/lab/claim/claim.d1/up/status",
        "splitfleet/lab/claim/claim.d1/up/certificate",
    ],
)
def test_a_foreign_topic_is_refused(topic: str) -> None:
    with pytest.raises(TopicError):
        TOPICS.parse(topic)


@pytest.mark.parametrize("fleet", ["", "a/b", "a b", "#", "x" * 65, "ä", "a\n"])
def test_a_malformed_fleet_name_is_refused(fleet: str) -> None:
    with pytest.raises(TopicError, match="characters"):
        Topics(fleet)


@pytest.mark.parametrize("device", sorted(RESERVED))
def test_reserved_names_are_no_devices(device: str) -> None:
    with pytest.raises(TopicError, match="reserved"):
        TOPICS.device_filters(device)


def test_no_tensor_is_retained() -> None:
    tensors = {"activations", "gradients", "features", "parameters"}
    kept = {
        address.kind
        for address in (
            *(Address("device", kind, device="d", direction="up") for kind in UP_KINDS),
            *(Address("device", kind, device="d", direction="down") for kind in DOWN_KINDS),
            *(Address("all", kind) for kind in ALL_KINDS),
            *(Address("cut", kind, layer=1) for kind in CUT_KINDS),
        )
        if address.retained
    }
    assert kept == {"status", "assignment", "round", "serving", "coordinator", "manifest"}
    assert not kept & tensors


@given(addresses)
def test_filters_reach_exactly_the_addressee(address: Address) -> None:
    topic = TOPICS.format(address)
    filters = (*TOPICS.coordinator_filters(), *TOPICS.claims_filters())
    to_coordinator = any(matches(f, topic) for f in filters)
    assert to_coordinator == (address.direction == "up")
    if address.scope == "device":
        assert address.device is not None
        to_device = any(matches(f, topic) for f in TOPICS.device_filters(address.device))
        assert to_device == (address.direction == "down")
    if address.layer is not None:
        assert any(matches(f, topic) for f in TOPICS.cut_filters(address.layer))
        assert not any(matches(f, topic) for f in TOPICS.cut_filters(address.layer + 1))


@given(addresses, names)
def test_a_device_may_write_only_what_goes_up_from_it(address: Address, device: str) -> None:
    topic = TOPICS.format(address)

    def may(access: str) -> bool:
        grants = TOPICS.device_grants(device)
        return any(g.access == access and matches(g.topic_filter, topic) for g in grants)

    own = address.device == device
    assert may("write") == (own and address.direction == "up")
    assert may("read") == (address.scope in ("all", "cut") or (own and address.direction == "down"))


@given(addresses, st.from_regex(r"(claim|back)\.[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_a_claim_may_enrol_and_nothing_else(address: Address, claim: str) -> None:
    topic = TOPICS.format(address)
    allowed = {g.access for g in TOPICS.claim_grants(claim) if matches(g.topic_filter, topic)}
    own = address.scope == "claim" and address.device == claim
    assert allowed == ({"write" if address.direction == "up" else "read"} if own else set())
    assert topic.startswith(TOPICS.claims) == (address.scope == "claim")


def test_the_coordinator_may_use_its_fleet_and_read_the_brokers_figures() -> None:
    assert TOPICS.coordinator_grants() == (
        Grant("readwrite", "splitfleet/lab/#"),
        Grant("read", "$SYS/#"),
    )


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("+/+", "/a", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("a/+/c", "a/b/d", False),
    ],
)
def test_wildcards_match_as_mqtt_says(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected
