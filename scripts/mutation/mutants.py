"""The known errors: each a small change of one file whose old text stands there exactly once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

DIFFERENTIAL: Final = "tests/differential/test_differential.py::test_sessions_are_answered_as_by_postgres"


class Stale(Exception):
    """The old text of a mutant does not stand in its file, or more than once."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One error, and the test that must see it."""

    name: str
    file: str
    old: str
    new: str
    test: str = DIFFERENTIAL

    def applied(self, root: Path) -> str:
        """The text of its file with the error in it. Raises Stale."""
        text = (root / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise Stale(f"{self.name}: the old text stands {count} times in {self.file}")
        return text.replace(self.old, self.new)


# In the order of their files: what is built for one serves the next.
RELAY: Final = (
    Mutant(
        "a Sync is lost behind an error",
        "gpooler/relay/session.pyx",
        "        if _at(self, 0).kind == POINT_SYNC:\n            return\n",
        "        if _at(self, 0).kind == POINT_SYNC:\n            _pop(self)\n            return\n",
    ),
    Mutant(
        "answers to swallow and the client's are counted as one run",
        "gpooler/relay/session.pyx",
        "if last.kind == kind and last.owner == owner and last.extended == extended:",
        "if last.kind == kind and last.extended == extended:",
    ),
    Mutant(
        "a ReadyForQuery is counted on behind a COPY in doubt",
        "gpooler/relay/session.pyx",
        "            and not self.is_uncertain and session_has_sync_point(self))\n",
        "            and session_has_sync_point(self))\n",
        "tests/integration/test_disconnect.py::"
        "test_a_client_that_leaves_a_copy_in_doubt_does_not_keep_its_server",
    ),
    Mutant(
        "LISTEN is not noticed",
        "gpooler/relay/scanner.pyx",
        "        elif word == W_LISTEN:\n            self.effects |= EFFECT_LISTEN\n",
        "        elif word == W_LISTEN:\n            pass\n",
    ),
    Mutant(
        "a literal goes on behind a backslash",
        "gpooler/relay/scanner.pyx",
        "                self.has_escapes = not self.is_conforming\n",
        "                self.has_escapes = self.is_conforming\n",
    ),
    Mutant(
        "a quote in a value that is deployed is not doubled",
        "gpooler/relay/params.pyx",
        "            if text[i] == c\"'\" or text[i] == c'\\\\':\n",
        "            if text[i] == c'\\\\':\n",
    ),
    Mutant(
        "nothing is deployed when one parameter differs",
        "gpooler/relay/params.pyx",
        "    if out.size == begun and (",
        "    if out.size - begun < 40 and (",
    ),
    Mutant(
        "what the client before has set is left where PostgreSQL does not report it",
        "gpooler/relay/params.pyx",
        "            if not a.flags & PARAM_REPORTED and a != was:\n                _reset_one(&out, a)\n",
        "            pass\n",
    ),
    Mutant(
        "a Parse that failed is remembered",
        "gpooler/relay/prepared.pyx",
        "            if change.kind == CHANGE_DEFINE or change.kind == CHANGE_ALIAS:\n",
        "            if change.kind == CHANGE_ALIAS:\n",
    ),
    Mutant(
        "a Close that was skipped is not undone",
        "gpooler/relay/prepared.pyx",
        "                names_put_back(names, change.name)\n                change.name = NULL\n",
        "                pass\n",
    ),
    Mutant(
        "a copy that PostgreSQL refused counts as there",
        "gpooler/relay/prepared.pyx",
        "        if change.kind == CHANGE_DEFINE or change.kind == CHANGE_COPY:\n"
        "            copies_remove(copies, statements, change.statement)\n",
        "        if change.kind == CHANGE_DEFINE:\n"
        "            copies_remove(copies, statements, change.statement)\n",
    ),
    Mutant(
        "a statement means the same whatever the settings of its client",
        "gpooler/relay/prepared.pxi",
        "        if size + part > CHUNK:\n            break\n        memcpy(at + size, c.params",
        "        if True:\n            break\n        memcpy(at + size, c.params",
    ),
    Mutant(
        "what was closed to make room counts as there",
        "gpooler/relay/prepared.pxi",
        "    copies_remove(&s.copies, &e.statements, oldest)\n    note_change(",
        "    copies_use(&s.copies, oldest)\n    note_change(",
        "tests/integration/test_prepared.py::test_more_statements_than_a_server_keeps",
    ),
    Mutant(
        "the unnamed statement of a stranger is met",
        "gpooler/relay/attach.pxi",
        "        c.flags |= MAY_MEET_UNNAMED\n",
        "        pass\n",
    ),
    Mutant(
        "the answer to parameters that are deployed reaches the client",
        "gpooler/relay/server.pxi",
        "is_ours = (c == NULL or owner == OWNER_DEPLOY or owner == OWNER_RESET or owner == OWNER_ASK\n",
        "is_ours = (c == NULL or owner == OWNER_RESET or owner == OWNER_ASK\n",
    ),
    Mutant(
        "a server is detached inside a transaction",
        "gpooler/relay/server.pxi",
        "    is_open = (s.session.status != c'I' or s.cancelling",
        "    is_open = (s.cancelling",
    ),
    Mutant(
        "the answer to what was prepared already is not renamed",
        "gpooler/relay/prepared.pxi",
        "        p[0] = c'1'\n",
        "        pass\n",
    ),
    Mutant(
        "a statement that the server lacks is not parsed there",
        "gpooler/relay/prepared.pxi",
        "    if copies_use(&s.copies, statement):\n        return\n    put_copy(e, s, statement)\n",
        "    if copies_use(&s.copies, statement) or s.copies.count > 2:\n"
        "        return\n    put_copy(e, s, statement)\n",
    ),
    Mutant(
        "behind a Sync nobody waits for what was prepared before it",
        "gpooler/relay/prepared.pxi",
        "    if ((s.changes.head != NULL or s.session.has_copy_end) and session_awaits_ready(&s.session)\n",
        "    if (False and session_awaits_ready(&s.session)\n",
    ),
    Mutant(
        "a Parse that is not bound yet keeps no server",
        "gpooler/relay/client.pxi",
        "                c.flags |= HAS_UNBOUND\n",
        "                pass\n",
    ),
    Mutant(
        "SET inside a block is forgotten",
        "gpooler/relay/settings.pxi",
        "    if s.touched_size + size + 2 <= MAX_TOUCHED and s.touched == NULL:\n",
        "    if s.session.status == c'T':\n        return\n"
        "    if s.touched_size + size + 2 <= MAX_TOUCHED and s.touched == NULL:\n",
    ),
    Mutant(
        "SET survives ROLLBACK: the server is asked as soon as the answer is in",
        "gpooler/relay/server.pxi",
        "    if not is_open and has_question(s):\n",
        "    if s.touched_size and s.session.status == c'T' and ask(e, s):\n        return\n"
        "    if not is_open and (s.pins & s.ends or s.flags & NEEDS_CHECK):\n",
    ),
    Mutant(
        "what is deallocated is still the client's",
        "gpooler/relay/prepared.pxi",
        "                names_take(c.prepared, at)\n                name_free(&e.statements, at)\n",
        "                pass\n",
        "tests/differential/test_found.py::test_deallocate_forgets_what_parse_has_prepared",
    ),
    Mutant(
        "a dirty server is parked as it is",
        "gpooler/relay/release.pxi",
        "    if (s.flags & IS_DIRTY or s.pins) and r.discard != DISCARD_NEVER:\n",
        "    if (s.flags & IS_DIRTY or s.pins) and r.discard == DISCARD_ALWAYS:\n",
    ),
    Mutant(
        "an open transaction is left to the next client",
        "gpooler/relay/release.pxi",
        "    if s.session.status != c'I':\n        if s.flags & (HAS_ROLLED_BACK",
        "    if s.session.status == c'E':\n        if s.flags & (HAS_ROLLED_BACK",
    ),
)

# Who comes in, and what is read of whom.
ENTRANCE: Final = (
    Mutant(
        "a wrong proof is as good as a right one",
        "gpooler/auth/scram_server.pyx",
        "is_equal(<char*> digest, <char*> verifier.stored_key, SHA256_LENGTH) and ",
        "",
        "tests/unit/test_scram.py",
    ),
    Mutant(
        "an exchange that is to fail may go well",
        "gpooler/auth/scram_server.pyx",
        "SHA256_LENGTH) and not self.is_doomed:\n",
        "SHA256_LENGTH):\n",
        "tests/unit/test_scram.py",
    ),
    Mutant(
        "any nonce will do",
        "gpooler/auth/scram_server.pyx",
        "        if nonce != self.nonce:\n",
        "        if not nonce:\n",
        "tests/unit/test_scram.py",
    ),
    Mutant(
        "what binds a channel is not compared",
        "gpooler/auth/scram_server.pyx",
        "and is_equal(PyBytes_AS_STRING(bound), PyBytes_AS_STRING(self.bound), len(bound))",
        "",
        "tests/unit/test_scram.py",
    ),
    Mutant(
        "somebody between may take channel binding away",
        "gpooler/auth/scram_server.pyx",
        '        elif flag == b"y" and self.offers_plus:\n',
        '        elif flag == b"y" and self.is_doomed:\n',
        "tests/unit/test_scram.py",
    ),
    Mutant(
        "one salt for all",
        "gpooler/client/express.pyx",
        "            guest.salt = random_bytes(SALT_LENGTH)\n",
        "            guest.salt = bytes(SALT_LENGTH)\n",
        "tests/integration/test_express.py",
    ),
    Mutant(
        "without TLS the short way of those with",
        "gpooler/client/express.pyx",
        "                or known.has_tls != (guest.tls is not None) or self.has_news(known)\n",
        "                or self.has_news(known)\n",
        "tests/integration/test_tls_clients.py::test_rules_tell_tls_apart",
    ),
    Mutant(
        "the short way from anywhere",
        "gpooler/client/express.pyx",
        "                or (known.address is not None and known.address != guest.address)):\n",
        "                ):\n",
        "tests/integration/test_express.py",
    ),
    Mutant(
        "a password is taken before it is whole",
        "gpooler/client/entrance.pyx",
        "                if size < length + 1:\n",
        "                if size < length:\n",
        "tests/integration/test_entrance.py",
    ),
    Mutant(
        "bytes before the handshake are a client's own",
        "gpooler/client/login.py",
        "            if guest.buffer:\n",
        "            if guest.buffer and guest.requests & GSSENC:\n",
        "tests/integration/test_tls_clients.py",
    ),
    Mutant(
        "who is banned may try",
        "gpooler/client/refusals.py",
        "        if self._failures.is_banned(guest.address, encode(user)):\n",
        '        if self._failures.is_banned(guest.address, b""):\n',
        "tests/integration/test_failed_logins.py",
    ),
    Mutant(
        "records that came together are one",
        "gpooler/relay/tls.pyx",
        "        tls.is_dry = <size_t> got < size and BIO_get_mem_data(tls.incoming, &data) == 0\n",
        "        tls.is_dry = <size_t> got < size\n",
        "tests/integration/test_tls_clients.py",
    ),
)

RECORDS: Final = (
    Mutant(
        "a number is used for two records",
        "gpooler/relay/records.pyx",
        "    side_nonce(side, side.sequence, nonce)\n    side.sequence += 1\n",
        "    side_nonce(side, side.sequence, nonce)\n    side.sequence |= 1\n",
        "tests/unit/test_records.py",
    ),
    Mutant(
        "OpenSSL's tickets are not counted",
        "gpooler/relay/records.pyx",
        "    r.writing.sequence = count\n",
        "    r.writing.sequence = min(count, 1)\n",
        "tests/unit/test_tls_handover.py",
    ),
    Mutant(
        "an answer to KeyUpdate waits for the next take",
        "gpooler/relay/records.pyx",
        "    before = renew(r, crypto, out)\n    if before >= 0:\n",
        "    before = 0\n    if before >= 0:\n",
        "tests/unit/test_records.py",
    ),
    Mutant(
        "a message goes on behind other records",
        "gpooler/relay/records.pyx",
        "    if content != CONTENT_HANDSHAKE and r.message_size:\n",
        "    if content == CONTENT_ALERT and r.message_size:\n",
        "tests/unit/test_records.py",
    ),
    Mutant(
        "work for nothing has no end",
        "gpooler/relay/records.pyx",
        "    if r.quiet > MAX_QUIET:\n",
        "    if r.quiet == 255:\n",
        "tests/unit/test_records.py",
    ),
    Mutant(
        "a fault is told behind the end",
        "gpooler/relay/records.pyx",
        "    r.owes_alert = NONE if r.is_closed else alert\n",
        "    r.owes_alert = alert\n",
        "tests/unit/test_records.py",
    ),
    Mutant(
        "plain bytes beyond the room are lost",
        "gpooler/relay/records.pyx",
        "    r.rest_end = <uint32_t> (length - size)\n",
        "    r.rest_end = <uint32_t> min(length - size, SMALL)\n",
        "tests/unit/test_records.py",
    ),
    Mutant(
        "records that are left are not kept",
        "gpooler/relay/tls.pyx",
        "    return tls.records == NULL or records_keep(tls.records)\n",
        "    return True\n",
        "tests/integration/test_tls_clients.py",
    ),
    Mutant(
        "another end's secret is taken",
        "gpooler/relay/tls.pyx",
        "        secret = &secrets.server[0]\n",
        "        secret = &secrets.client[0]\n",
        "tests/unit/test_tls_handover.py",
    ),
)

MUTANTS: Final = (*RELAY, *ENTRANCE, *RECORDS)
