"""The full matrix: client method, server method, and TLS on both sides."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest

from tests.security.cells import Cell, Method, Server, all_cells, expected
from tests.security.document import PAGE, page
from tests.security.pairwise import pairwise
from tests.security.stage import SERVER_USERS, STRANGER, USERS, Stage, database
from tests.security.visit import Seen, visit


@cache
def chosen(is_full: bool) -> dict[tuple[Method, Server], list[Cell]]:
    """The cells to be tried, by what the test is parametrised with."""
    found = defaultdict(list)
    for cell in all_cells() if is_full else pairwise(all_cells()):
        found[cell.method, cell.server].append(cell)
    return found


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    cells = [cell for some in chosen(request.config.getoption("--full")).values() for cell in some]
    with Stage(cells) as made:
        yield made
        assert made.gpooler.leaks() == [], made.gpooler.tail()


def fits(cell: Cell, seen: Seen) -> bool:
    """Whether that is what had to come of it."""
    wanted = expected(cell)
    if wanted.refusal is None:
        user = SERVER_USERS.get(cell.server, USERS[cell.method])
        return seen == Seen(wanted.asked, "", "", wanted.has_tls, user, wanted.server_has_tls)
    user = STRANGER if cell.method is Method.PEER and not cell.has_right_proof else USERS[cell.method]
    text = wanted.refusal.text.replace("USER", user).replace("DATABASE", database(cell))
    if not wanted.refusal.sqlstate:
        return seen.asked == wanted.asked and not seen.sqlstate and text in seen.error
    return seen == Seen(wanted.asked, wanted.refusal.sqlstate, text)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("method", "server"),
    [pytest.param(*pair, id=f"{pair[0]} to {pair[1]}") for pair in product(Method, Server)],
)
def test_who_comes_in_by_which_way_and_who_does_not(
    request: pytest.FixtureRequest, stage: Stage, method: Method, server: Server
) -> None:
    """With ``--full`` every TLS mode of one side with each of the other; else each pair of values once."""
    if method in stage.missing:
        pytest.skip(stage.missing[method])
    surprises = []
    for cell in chosen(request.config.getoption("--full"))[method, server]:
        seen = visit(stage, cell)
        if not fits(cell, seen):
            surprises.append(f"{cell}\n  expected {expected(cell)}\n  seen     {seen}")
    assert not surprises, f"{len(surprises)} surprises:\n" + "\n".join(surprises[:20])


def test_the_documentation_says_the_same() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.security.document"
