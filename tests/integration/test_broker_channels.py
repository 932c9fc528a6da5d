"""Channels between processes: order, descriptors, full queues, deaths."""

import gc
import os
import socket

import gevent
import pytest

from gpooler.broker.codec import ChannelProtocolError
from gpooler.broker.messages import CODEC, Closed, Connected, RouteParameters, Want
from gpooler.process import control, datagrams
from gpooler.process.channels import Channel, ChannelClosed


@pytest.fixture
def ends():
    before = open_descriptors()
    a, b = datagrams.pair()
    left, right = Channel(a, CODEC), Channel(b, CODEC)
    yield left, right
    left.close()
    right.close()
    gevent.sleep(0)  # a channel in use closes its socket in the next round of the loop
    gevent.sleep(0)
    gc.collect()
    assert open_descriptors() == before


def open_descriptors():
    return {
        target
        for name in os.listdir("/proc/self/fd")
        if (target := link(name)).startswith(("socket:", "pipe:", "/memfd"))
    }


def link(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


def test_messages_arrive_in_order(ends):
    left, right = ends
    sent = [Want(1, n) for n in range(50)]
    for message in sent:
        left.send(message)
    assert [right.receive() for _ in sent] == [(message, []) for message in sent]
    assert (left.sent, right.received) == (50, 50)


def test_a_sender_never_waits_and_a_full_channel_keeps_the_order(ends):
    left, right = ends
    big = {"search_path": "x" * 50_000}
    for n in range(100):
        left.send(RouteParameters(n, big))
    received = [right.receive()[0].route_id for _ in range(100)]
    assert received == list(range(100))


def test_two_full_channels_do_not_wait_for_each_other(ends):
    left, right = ends
    big = {"search_path": "x" * 50_000}
    for n in range(40):
        left.send(RouteParameters(n, big))
        right.send(RouteParameters(n, big))
    readers = [gevent.spawn(lambda end=end: [end.receive()[0].route_id for _ in range(40)]) for end in ends]
    gevent.joinall(readers, raise_error=True)
    assert [reader.value for reader in readers] == [list(range(40))] * 2


def test_a_descriptor_arrives_close_on_exec_and_is_the_receivers_own(ends):
    left, right = ends
    reader, writer = os.pipe()
    left.send(Connected(1, 2, 3, "/s"), [writer])
    os.close(writer)
    message, fds = right.receive()
    assert message == Connected(1, 2, 3, "/s")
    assert not os.get_inheritable(fds[0])
    os.write(fds[0], b"through")
    assert os.read(reader, 10) == b"through"
    os.close(fds[0])
    os.close(reader)


def test_a_queued_descriptor_may_be_closed_by_its_owner_at_once(ends):
    left, right = ends
    big = {"search_path": "x" * 100_000}
    for _ in range(10):
        left.send(RouteParameters(0, big))
    reader, writer = os.pipe()
    left.send(Connected(1, 2, 3, "/s"), [writer])
    os.close(writer)
    for _ in range(10):
        right.receive()
    message, fds = right.receive()
    assert isinstance(message, Connected)
    os.close(fds[0])
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_what_a_dead_peer_had_sent_is_still_received(ends):
    left, right = ends
    right.send(Want(9, 9))  # unread by the one who dies: Linux reports a reset before the queue
    left.send(Want(1, 1))
    left.send(Want(1, 2))
    left.close()
    assert [right.receive()[0].waiting for _ in range(2)] == [1, 2]
    assert right.receive() is None
    right.send(Want(1, 3))  # goes nowhere, harms nobody


def test_a_close_wakes_who_receives(ends):
    left, _ = ends
    reader = gevent.spawn(left.receive)
    gevent.sleep(0)
    left.close()
    with pytest.raises(ChannelClosed):
        reader.get()


def test_a_close_drops_what_is_queued(ends):
    left, right = ends
    big = {"search_path": "x" * 100_000}
    for _ in range(10):
        left.send(RouteParameters(0, big))
    gevent.sleep(0)
    left.close()
    count = 0
    while right.receive() is not None:
        count += 1
    assert 0 < count < 10


def test_a_message_with_the_wrong_number_of_descriptors_is_not_sent(ends):
    left, _ = ends
    with pytest.raises(ChannelProtocolError, match="goes with 1"):
        left.send(Connected(1, 2, 3, "/s"))


@pytest.mark.parametrize("datagram", [b'["Want",1,2]', b'["Nonsense"]', b"\x00"])
def test_descriptors_of_a_wrong_message_are_closed(datagram):
    a, b = datagrams.pair()
    before = open_descriptors()
    reader, writer = os.pipe()
    datagrams.send_datagram(a, datagram, [writer, writer])
    os.close(writer)
    with pytest.raises(ChannelProtocolError):
        datagrams.receive(b, CODEC)
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert open_descriptors() == before
    a.close()
    b.close()


def test_a_datagram_over_the_limit_is_refused_by_the_receiver():
    a, b = datagrams.pair()
    a.send(b'["RouteParameters",1,{"x":"' + b"x" * 150_000 + b'"}]')
    with pytest.raises(ChannelProtocolError, match="cut off"):
        datagrams.receive(b, CODEC)
    a.close()
    b.close()


def test_the_master_hands_a_child_a_new_channel():
    master, child = datagrams.pair()
    ours, theirs = datagrams.pair()
    datagrams.send(master, control.CODEC, control.AttachBroker(3), [theirs.fileno()])
    theirs.close()
    message, fds = datagrams.receive(child, control.CODEC)
    assert message == control.AttachBroker(3)
    handed = socket.socket(fileno=fds[0])
    assert (handed.family, handed.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    datagrams.send(handed, CODEC, Closed(1, 2, 3))
    assert datagrams.receive(ours, CODEC) == (Closed(1, 2, 3), [])
    handed.close()
    assert datagrams.receive(ours, CODEC) is None
    for sock in (master, child, ours):
        sock.close()


def test_a_full_control_channel_says_so_to_a_master_that_must_not_wait():
    master, child = datagrams.pair()
    master.setblocking(False)
    assert fill(master) > 10
    assert datagrams.receive(child, control.CODEC) == (control.ReopenLog(), [])
    child.close()
    with pytest.raises(ConnectionError):
        datagrams.send(master, control.CODEC, control.ReopenLog())
    master.close()


def fill(sock):
    count = 0
    while True:
        try:
            datagrams.send(sock, control.CODEC, control.ReopenLog())
        except BlockingIOError:
            return count
        count += 1
