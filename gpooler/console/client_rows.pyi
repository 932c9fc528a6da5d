from collections.abc import Callable

from gpooler.console.facts import SocketFact

INDEX_BITS: int

def client_facts(
    rows: bytes,
    worker: int,
    first_number: int,
    name_of: Callable[[int], tuple[str, str]],
    replication_of: Callable[[int], str],
    tls_text: Callable[[int], str],
    pin_names: Callable[[int], str],
) -> list[SocketFact]: ...
