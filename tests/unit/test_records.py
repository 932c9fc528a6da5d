"""TLS 1.3's records: RFC 8448's example, a peer by the package cryptography, and what RFC 8446 forbids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpooler.relay.probe import records_session
from tests.harness.records import ALERT, DATA, HANDSHAKE, SUITES, Direction, InvalidTag, Peer, prepare

RECORD = 16384
CLOSE_NOTIFY = b"\1\0"
KEEP, ANSWER = b"\x18\0\0\1\0", b"\x18\0\0\1\1"  # KeyUpdate, without and with a request for the same
UNEXPECTED_MESSAGE, BAD_RECORD_MAC, RECORD_OVERFLOW, ILLEGAL_PARAMETER, DECODE_ERROR = 10, 20, 22, 47, 50
RENEW_AFTER = 1 << 23

every_suite = pytest.mark.parametrize("suite", SUITES, ids=[name.decode() for name in SUITES])


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare()


@pytest.fixture(params=SUITES, ids=[name.decode() for name in SUITES])
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(request.param)


# -- RFC 8448, section 3: the example's secrets and its records after the handshake

CLIENT_SECRET = bytes.fromhex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")
SERVER_SECRET = bytes.fromhex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
TICKET = bytes.fromhex(
    "17030300de3a6b8f90414a97d6959c3487680de5134a2b240e6cffac116e95d41d6af8f6b580dcf3d11d63c758db289a"
    "015940252f55713e061dc13e078891a38efbcf5753ad8ef170ad3c7353d16d9da773b9ca7f2b9fa1b6c0d4a3d03f75e0"
    "9c30ba1e62972ac46f75f7b981be63439b2999ce13064615139891d5e4c5b406f16e3fc181a77ca475840025db2f0a77"
    "f81b5ab05b94c01346755f69232c86519d86cbeeac87aac347d143f9605d64f650db4d023e70e952ca49fe5137121c74"
    "bc2697687e248746d6df353005f3bce18696129c8153556b3b6c6779b37bf15985684f"
)
FROM_CLIENT = bytes.fromhex(
    "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b"
    "62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4"
)
FROM_SERVER = bytes.fromhex(
    "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602dcb501a59a8"
    "fcc49c4bf2e5f0a21c0047c2abf332540dd032e167c2955d"
)
CLIENT_CLOSES = bytes.fromhex("1703030013c9872760655666b74d7ff1153efd6db6d0b0e3")
SERVER_CLOSES = bytes.fromhex("1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9")
EXAMPLE_SUITE = b"TLS_AES_128_GCM_SHA256"


def test_the_example_of_rfc_8448() -> None:
    """Its server's end, which goes on behind the ticket that was sealed by somebody else."""
    session = records_session(EXAMPLE_SUITE, CLIENT_SECRET, SERVER_SECRET, sent=TICKET)
    session.put(FROM_CLIENT)
    assert session.read() == bytes(range(50))
    session.write(bytes(range(50)))
    assert session.take() == FROM_SERVER
    session.put(CLIENT_CLOSES)
    assert session.read() is None
    session.close()
    assert session.take() == SERVER_CLOSES


@pytest.mark.parametrize(
    "sent",
    [FROM_SERVER, TICKET[:-1], TICKET[:-1] + b"\0", TICKET + TICKET, TICKET + b"\x17", b"\x17\3\3\0\0"],
    ids=["its second", "cut", "changed", "twice", "a byte more", "empty"],
)
def test_it_does_not_go_on_behind_records_that_are_not_its_own(sent: bytes) -> None:
    with pytest.raises(ValueError, match="no such session"):
        records_session(EXAMPLE_SUITE, CLIENT_SECRET, SERVER_SECRET, sent=sent)


def test_secrets_fit_the_suite() -> None:
    for suite, secret in ((b"TLS_AES_256_GCM_SHA384", CLIENT_SECRET), (b"TLS_AES_128_CCM_SHA256", bytes(32))):
        with pytest.raises(ValueError, match="no such session"):
            records_session(suite, secret, secret)


# -- data


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 1023, 1024, 1025, RECORD - 1, RECORD, RECORD + 1, 50_000])
def test_every_size_both_ways(peer: Peer, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    for _ in range(3):
        peer.session.write(data)
        found = peer.take()
        assert b"".join(part for _, part in found) == data
        assert {content for content, _ in found} == {DATA}
        for at in range(0, size, RECORD):
            peer.put(DATA, data[at : at + RECORD], padding=size % 200)
        assert peer.read() == data
    assert peer.take() == []


@settings(max_examples=100, deadline=None)
@given(
    suite=st.sampled_from(list(SUITES)),
    acts=st.lists(
        st.one_of(
            st.tuples(
                st.just("data"), st.integers(0, 3000) | st.integers(RECORD - 20, RECORD), st.integers(0, 200)
            ),
            st.tuples(st.just("renew"), st.booleans(), st.integers(0, 20)),
            st.tuples(st.just("write"), st.integers(1, 40_000), st.just(0)),
        ),
        max_size=12,
    ),
    cuts=st.lists(st.integers(1, 40) | st.integers(1, 20_000), min_size=1, max_size=20),
    most=st.sampled_from([1, 7, 1000, RECORD - 1, RECORD]),
)
def test_any_acts_cut_anywhere_and_read_in_any_pieces(
    suite: bytes, acts: list[tuple[str, int, int]], cuts: list[int], most: int
) -> None:
    peer = Peer(suite)
    number = 0

    def deliver(record: bytes) -> bytes:
        nonlocal number
        found = b""
        while record:
            size = cuts[number % len(cuts)]
            number += 1
            peer.send(record[:size])
            record = record[size:]
            if number % 3:
                found += peer.read(most)
        return found + peer.read(most)

    for kind, value, padding in acts:
        if kind == "data":
            data = bytes(index % 249 for index in range(value))
            assert deliver(peer.out.seal(DATA, data, padding)) == data
            assert peer.take() == []
        elif kind == "renew":
            record = peer.out.seal(HANDSHAKE, ANSWER if value else KEEP, padding)
            peer.out.renew()
            assert deliver(record) == b""
            assert peer.take() == ([(HANDSHAKE, KEEP)] if value else [])
        else:
            data = bytes(index % 247 for index in range(value))
            peer.session.write(data)
            assert b"".join(part for _, part in peer.take()) == data


def test_many_records_in_one_piece(peer: Peer) -> None:
    rows = [b"row %d;" % number for number in range(1000)]
    peer.send(b"".join(peer.out.seal(DATA, row) for row in rows) + b"\x17\3")
    assert peer.read(5) == b"".join(rows)


# -- new keys


def test_an_answer_goes_out_before_what_is_written_next(peer: Peer) -> None:
    record = peer.out.seal(HANDSHAKE, ANSWER)
    peer.out.renew()
    peer.send(record + peer.out.seal(DATA, b"behind"))
    assert peer.read() == b"behind"
    peer.session.write(b"reply")
    assert peer.take() == [(HANDSHAKE, KEEP), (DATA, b"reply")]
    peer.session.write(b"more")
    assert peer.take() == [(DATA, b"more")]


def test_several_requests_are_answered_once(peer: Peer) -> None:
    """Section 4.6.3: those that come while nothing is said."""
    for _ in range(5):
        peer.put(HANDSHAKE, ANSWER)
        peer.out.renew()
    assert peer.read() == b""
    assert peer.take() == [(HANDSHAKE, KEEP)]


def test_a_message_may_come_in_pieces(peer: Peer) -> None:
    for at in range(len(ANSWER)):
        peer.put(HANDSHAKE, ANSWER[at : at + 1])
    peer.out.renew()
    peer.put(DATA, b"behind")
    assert peer.read() == b"behind"
    assert peer.take() == [(HANDSHAKE, KEEP)]


@every_suite
def test_a_key_is_renewed_before_it_has_worked_too_long(suite: bytes) -> None:
    """Section 5.5."""
    peer = Peer(suite, number=RENEW_AFTER - 1)
    peer.session.write(b"the last")
    peer.session.write(b"the next")
    assert peer.take() == [(DATA, b"the last"), (HANDSHAKE, KEEP), (DATA, b"the next")]
    assert peer.back.number == 1


# -- ends


def test_the_peer_says_no_more_and_still_listens(peer: Peer) -> None:
    peer.put(DATA, b"the last")
    peer.put(ALERT, b"\1\x5a")  # user_canceled
    peer.put(ALERT, CLOSE_NOTIFY)
    assert peer.read() == b"the last"
    peer.put(DATA, b"not any more")
    assert peer.session.read() is None
    peer.session.write(b"reply")
    peer.session.close()
    peer.session.close()
    assert peer.take() == [(DATA, b"reply"), (ALERT, CLOSE_NOTIFY)]
    assert peer.session.read() is None


def test_nothing_is_said_behind_our_own_end(peer: Peer) -> None:
    peer.session.close()
    assert peer.take() == [(ALERT, CLOSE_NOTIFY)]
    with pytest.raises(ConnectionError):
        peer.session.write(b"x")
    peer.put(HANDSHAKE, ANSWER)
    peer.out.renew()
    peer.put(DATA, b"still heard")
    assert peer.read() == b"still heard"
    assert peer.take() == []


@pytest.mark.parametrize(
    "alert", [bytes([level, what]) for level in (1, 2) for what in (10, 20, 40, 80, 255)]
)
def test_every_other_alert_is_the_end(peer: Peer, alert: bytes) -> None:
    peer.put(ALERT, alert)
    with pytest.raises(ConnectionError):
        peer.session.read()
    with pytest.raises(ConnectionError):
        peer.session.write(b"x")
    peer.session.close()
    assert peer.take() == []


# -- what is refused


def sealed(content: int, data: bytes, padding: int = 0) -> list[tuple[int, bytes, int]]:
    return [(content, data, padding)]


@pytest.mark.parametrize(
    ("records", "alert"),
    [
        (sealed(DATA, bytes(RECORD + 1)), RECORD_OVERFLOW),
        (sealed(0, b"\0\0\0"), UNEXPECTED_MESSAGE),
        (sealed(20, b"\1"), UNEXPECTED_MESSAGE),
        (sealed(24, b"\1"), UNEXPECTED_MESSAGE),
        (sealed(ALERT, b""), UNEXPECTED_MESSAGE),
        (sealed(ALERT, b"\1"), DECODE_ERROR),
        (sealed(ALERT, CLOSE_NOTIFY * 2), DECODE_ERROR),
        (sealed(HANDSHAKE, b""), UNEXPECTED_MESSAGE),
        (sealed(HANDSHAKE, b"\1\0\0\1\0"), UNEXPECTED_MESSAGE),
        (sealed(HANDSHAKE, b"\4"), UNEXPECTED_MESSAGE),
        (sealed(HANDSHAKE, b"\x18\0\0\1\2"), ILLEGAL_PARAMETER),
        (sealed(HANDSHAKE, b"\x18\0\0\2\0"), DECODE_ERROR),
        (sealed(HANDSHAKE, b"\x18\0\1\1\0"), DECODE_ERROR),
        (sealed(HANDSHAKE, b"\x18\1\0\1\0"), DECODE_ERROR),
        (sealed(HANDSHAKE, KEEP + b"\x18"), UNEXPECTED_MESSAGE),
        (sealed(HANDSHAKE, KEEP * 2), UNEXPECTED_MESSAGE),
        (sealed(HANDSHAKE, KEEP[:3]) + sealed(DATA, b"between"), UNEXPECTED_MESSAGE),
        (sealed(HANDSHAKE, KEEP[:3]) + sealed(ALERT, CLOSE_NOTIFY), UNEXPECTED_MESSAGE),
    ],
    ids=lambda value: None if isinstance(value, int) else "+".join(f"{c}:{d[:9].hex()}" for c, d, _ in value),
)
def test_what_is_genuine_and_wrong(peer: Peer, records: list[tuple[int, bytes, int]], alert: int) -> None:
    for content, data, padding in records:
        peer.put(content, data, padding)
    with pytest.raises(ConnectionError):
        peer.session.read()
    assert peer.take() == [(ALERT, bytes([2, alert]))]
    assert_broken(peer)


def test_a_fault_behind_our_own_end_is_not_told(peer: Peer) -> None:
    peer.session.close()
    assert peer.take() == [(ALERT, CLOSE_NOTIFY)]
    peer.put(20, b"x")
    with pytest.raises(ConnectionError):
        peer.session.read()
    assert_broken(peer)


def assert_broken(peer: Peer) -> None:
    """Nothing more comes out of it, and nothing goes in."""
    peer.put(DATA, b"x")
    with pytest.raises(ConnectionError):
        peer.session.read()
    with pytest.raises(ConnectionError):
        peer.session.write(b"x")
    assert peer.take() == []


@pytest.mark.parametrize(
    ("header", "alert"),
    [
        (b"\x16\3\3\0\x20", UNEXPECTED_MESSAGE),
        (b"\x15\3\3\0\2", UNEXPECTED_MESSAGE),  # an alert in the clear
        (b"\x14\3\3\0\1", UNEXPECTED_MESSAGE),
        (b"Q\0\0\0\x20", UNEXPECTED_MESSAGE),
        (b"\x17\3\3\0\0", DECODE_ERROR),
        (b"\x17\3\3\0\x10", DECODE_ERROR),
        (b"\x17\3\3\x41\1", RECORD_OVERFLOW),
        (b"\x17\3\3\xff\xff", RECORD_OVERFLOW),
    ],
)
def test_what_no_record_can_begin_with(peer: Peer, header: bytes, alert: int) -> None:
    """Said as soon as its header is there."""
    peer.put(DATA, b"before")
    peer.send(header[:3])
    assert peer.read() == b"before"
    peer.send(header[3:])
    with pytest.raises(ConnectionError):
        peer.session.read()
    assert peer.take() == [(ALERT, bytes([2, alert]))]
    assert_broken(peer)


def test_no_byte_of_a_record_can_be_changed(peer: Peer) -> None:
    """But its length, which says where it ends: with another one it is longer, or breaks."""
    secret = peer.out.secret
    suite = next(name for name, facts in SUITES.items() if facts[2].digest_size == len(secret))
    for at in (0, 1, 2, *range(5, 5 + 8 + 1 + 16)):
        one = Peer(suite)
        record = bytearray(one.out.seal(DATA, b"12345678"))
        record[at] ^= 1
        one.send(bytes(record))
        with pytest.raises(ConnectionError):
            one.session.read()


@pytest.mark.parametrize("order", [(0, 0), (1, 0), (0, 2, 1)], ids=["again", "swapped", "lost"])
def test_records_come_once_and_in_order(peer: Peer, order: tuple[int, ...]) -> None:
    records = [peer.out.seal(DATA, b"%d" % number) for number in range(3)]
    peer.send(b"".join(records[number] for number in order))
    with pytest.raises(ConnectionError):
        peer.read()
    assert peer.take() == [(ALERT, bytes([2, BAD_RECORD_MAC]))]


def test_what_came_before_a_broken_record_is_read(peer: Peer) -> None:
    peer.send(peer.out.seal(DATA, b"good") + b"\x17\3\3\0\x20" + bytes(32))
    assert peer.session.read() == b"good"
    with pytest.raises(ConnectionError):
        peer.session.read()


@pytest.mark.parametrize("content", [DATA, HANDSHAKE])
def test_work_for_nothing_has_an_end(peer: Peer, content: int) -> None:
    """Records without bytes, or new keys again and again, in one read."""

    def work(count: int) -> bytes:
        made = peer.out.seal(DATA, b"!")
        for _ in range(count):
            made += peer.out.seal(DATA, b".")
            made += peer.out.seal(content, b"" if content == DATA else KEEP)
            if content == HANDSHAKE:
                peer.out.renew()
        return made

    for _ in range(10):
        peer.send(work(32))
        assert peer.read() == b"!" + 32 * b"."
    peer.send(work(33))
    with pytest.raises(ConnectionError):
        peer.read()


@every_suite
def test_the_keys_of_one_direction_do_not_open_the_other(suite: bytes) -> None:
    peer = Peer(suite)
    peer.session.write(b"to the peer")
    peer.send(peer.session.take())
    with pytest.raises(ConnectionError):
        peer.session.read()
    peer.session.take()
    with pytest.raises(InvalidTag):
        Direction(suite, peer.back.secret).open(Direction(suite, peer.out.secret).seal(DATA, b"x"))
