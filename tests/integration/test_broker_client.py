"""The worker's side of the channel to the broker, over a real channel with a broker played by the test."""

import os

import gevent
import pytest

from gpooler.broker import messages as m
from gpooler.broker.client import BrokerClient
from gpooler.broker.codec import ChannelProtocolError
from gpooler.log import LogSettings
from gpooler.logs.direct import DirectLog
from gpooler.process import datagrams
from gpooler.process.channels import Channel
from gpooler.stats.shared import SharedCounters


class Ended(gevent.GreenletExit):
    """Stands for the end of the process."""


class Worker:
    """Notes what it hears; a route exists once RouteOpened was heard."""

    def __init__(self):
        self.routes = {}
        self.gone = 0
        self.nonsense = []

    def report(self):
        return []

    def on_broker_message(self, message, fds):
        if isinstance(message, m.RouteOpened):
            self.routes[message.route_id] = message.parameters
        elif isinstance(message, m.RouteParameters):
            self.routes[message.route_id] = message.parameters if message.route_id in self.routes else 1 / 0
        elif not isinstance(message, m.Welcome):
            raise ChannelProtocolError("out of place")

    def on_broker_gone(self):
        self.gone += 1

    def on_broker_nonsense(self, cause):
        self.nonsense.append(cause)
        raise Ended


class House:
    """A client and its broker."""

    def __init__(self):
        self.counters = SharedCounters.create()
        self.worker = Worker()
        logger = DirectLog(LogSettings(format="%m"), []).logger
        self.client = BrokerClient(
            lambda: m.Hello(m.PROTOCOL_VERSION, os.getpid(), 1, 1), self.worker, self.counters, logger
        )
        self.broker = None
        self.new_broker()

    def new_broker(self):
        ours, theirs = datagrams.pair()
        if self.broker is not None:
            self.broker.close()
        self.broker = Channel(theirs, m.CODEC)
        self.client.attach(Channel(ours, m.CODEC))
        self.hear(m.ReportEnd)

    def hear(self, kind):
        with gevent.Timeout(5):
            while True:
                message, _ = self.broker.receive()
                if isinstance(message, kind):
                    return message


@pytest.fixture
def house():
    house = House()
    yield house
    house.broker.close()
    gevent.sleep(0.01)
    house.client._channel.close()
    gevent.sleep(0)
    house.counters.close()


def until(check):
    with gevent.Timeout(5):
        while not check():
            gevent.sleep(0.001)


def test_a_message_about_a_new_route_may_follow_at_once(house):
    asking = gevent.spawn(house.client.open_route, "r", "d", "u", False)
    token = house.hear(m.OpenRoute).token
    house.broker.send(m.RouteOpened(token, 7, "r", "d", "u", False, None))
    house.broker.send(m.RouteParameters(7, {"TimeZone": "UTC"}))
    assert asking.get(timeout=5).route_id == 7
    until(lambda: house.worker.routes[7] == {"TimeZone": "UTC"})
    assert not house.worker.nonsense


def test_what_cannot_be_obeyed_ends_the_worker(house):
    house.broker.send(m.RouteParameters(8, {}))
    until(lambda: house.worker.nonsense)
    assert "ZeroDivisionError" in house.worker.nonsense[0]


def test_a_message_out_of_place_ends_the_worker(house):
    house.broker.send(m.Want(1, 1))
    until(lambda: house.worker.nonsense)
    assert house.worker.nonsense == ["out of place"]


def test_a_datagram_that_is_no_message_ends_the_worker(house):
    datagrams.send_datagram(house.broker._sock, b"nonsense", ())
    until(lambda: house.worker.nonsense)


def test_the_death_of_the_broker_is_told_and_an_open_question_is_asked_again(house):
    asking = gevent.spawn(house.client.open_route, "r", "d", "u", False)
    first = house.hear(m.OpenRoute)
    told = house.worker.gone
    house.broker.close()
    until(lambda: house.worker.gone > told)
    assert not house.client.is_attached
    house.new_broker()
    assert house.client.is_attached
    assert house.hear(m.OpenRoute) == first
    house.broker.send(m.RouteOpened(first.token, 3, "r", "d", "u", False, {}))
    assert asking.get(timeout=5).route_id == 3


def test_a_dead_broker_is_noticed_when_something_is_sent(house):
    house.broker._sock.close()
    house.client.send(m.Want(1, 1))
    assert not house.client.is_attached
