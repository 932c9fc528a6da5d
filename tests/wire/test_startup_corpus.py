"""Every startup packet of the corpus is read as ``startup/expected.json`` says.

A file holds one packet as it comes from a socket, length word first; the fuzz targets take the same files.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from gpooler.errors import GpoolerError
from gpooler.wire import startup

CORPUS = Path(__file__).parent / "startup"
EXPECTED: dict[str, dict[str, Any]] = json.loads((CORPUS / "expected.json").read_text())


def read(path: str) -> startup.Packet:
    data = (CORPUS / path).read_bytes()
    length = startup.parse_startup_length(data[:4])
    assert len(data) == 4 + length
    return startup.parse_startup(data[4:])


def cases(folder: str) -> list[str]:
    return sorted(path for path in EXPECTED if path.startswith(folder))


def test_corpus_and_expectations_name_the_same_files() -> None:
    files = {path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*.bin")}
    assert files == set(EXPECTED)


@pytest.mark.parametrize("path", cases("valid"))
def test_valid_packet_is_read(path: str) -> None:
    packet = read(path)
    expected = EXPECTED[path]
    match packet:
        case startup.SSLRequest():
            assert expected["kind"] == "ssl"
        case startup.GSSENCRequest():
            assert expected["kind"] == "gssenc"
        case startup.CancelRequest(pid, secret):
            assert expected["kind"] == "cancel"
            assert (pid, secret.hex()) == (expected["pid"], expected["secret"])
        case startup.Startup():
            assert expected["kind"] == "startup"
            assert packet.major == 3
            for name in ("minor", "user", "database", "parameters", "replication", "secret_length"):
                assert getattr(packet, name) == expected[name], name
            assert list(packet.protocol_options) == expected["protocol_options"]
            assert packet.negotiation().hex() == expected["negotiation"]


@pytest.mark.parametrize("path", cases("invalid"))
def test_invalid_packet_is_refused_with_the_text_of_postgresql(path: str) -> None:
    with pytest.raises(GpoolerError) as caught:
        read(path)
    fields = caught.value.fields()
    assert (fields["C"], fields["M"]) == (EXPECTED[path]["sqlstate"], EXPECTED[path]["message"])
    assert fields["S"] == "FATAL"
