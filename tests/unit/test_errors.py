"""What a client sees of gpooler's errors, and what only the log sees."""

import inspect

import pytest

from gpooler import errors

EXAMPLES: list[tuple[errors.GpoolerError, str, str]] = [
    (errors.ProtocolViolation("invalid startup packet"), "FATAL", "08P01"),
    (errors.LoginTimeout(15000), "FATAL", "08P01"),
    (errors.TlsRequired(), "FATAL", "08P01"),
    (errors.TlsFailed(cause="unexpected message"), "FATAL", "08P01"),
    (errors.CertificateNeedsTls(), "FATAL", "28000"),
    (errors.FeatureNotSupported("replication connections are not supported"), "FATAL", "0A000"),
    (errors.InvalidArguments("invalid command-line argument"), "FATAL", "42601"),
    (errors.InvalidParameterValue('invalid value for parameter "replication"'), "FATAL", "22023"),
    (errors.ParameterCannotChange("server_version"), "FATAL", "55P02"),
    (errors.TooManyParameters(), "FATAL", "54000"),
    (errors.InvalidAuthorization("no PostgreSQL user name specified"), "FATAL", "28000"),
    (errors.UserBlocked("app", "orders"), "FATAL", "28000"),
    (errors.AuthenticationFailed("app", cause="wrong password"), "FATAL", "28P01"),
    (errors.AuthenticationUndecided("app", cause="no answer"), "FATAL", "28P01"),
    (errors.AuthQueryFailed("app", cause="no answer"), "FATAL", "28000"),
    (errors.NoRule("orders", "app"), "FATAL", "3D000"),
    (errors.StatementPoolRefusal(), "ERROR", "0A000"),
    (errors.SessionStateRefusal(), "ERROR", "0A000"),
    (errors.TargetNotBuilt(), "ERROR", "0A000"),
    (errors.TargetInvalid(), "ERROR", "22023"),
    (errors.VirtualRefusal(), "ERROR", "0A000"),
    (errors.PreparedStatementRefusal(), "ERROR", "0A000"),
    (errors.ConsoleSyntaxError('syntax error at or near "POLS"'), "ERROR", "42601"),
    (errors.ConsoleDenied("PAUSE"), "ERROR", "42501"),
    (errors.ConsoleNotAllowed("app"), "FATAL", "42501"),
    (errors.ConsoleIsNoServer(), "FATAL", "0A000"),
    (errors.ConsoleRefused("there is no client 7"), "ERROR", "55000"),
    (errors.ConsoleFailed(cause="uncaught KeyError"), "ERROR", "XX000"),
    (errors.ConsoleUnsupported("the console has no function calls"), "ERROR", "0A000"),
    (errors.UnknownDatabase("orders"), "ERROR", "3D000"),
    (errors.UndefinedColumn("usr"), "ERROR", "42703"),
    (errors.UndefinedObject("function f() does not exist"), "ERROR", "42704"),
    (errors.UnknownStatement('prepared statement "s" does not exist'), "ERROR", "26000"),
    (errors.UnknownPortal('portal "p" does not exist'), "ERROR", "34000"),
    (errors.DuplicateStatement('prepared statement "s" already exists'), "ERROR", "42P05"),
    (errors.InvalidText('invalid input syntax for type integer: "x"'), "ERROR", "22P02"),
    (errors.TransactionFailed(), "ERROR", "25P02"),
    (errors.BindMismatch("bind message supplies 1 parameters"), "ERROR", "08P01"),
    (errors.QueryCancelled(), "ERROR", "57014"),
    (errors.QueryTimeout(), "FATAL", "57014"),
    (errors.TransactionTimeout(), "FATAL", "25P04"),
    (errors.IdleInTransactionTimeout(), "FATAL", "25P03"),
    (errors.IdleSessionTimeout(), "FATAL", "57P05"),
    (errors.IdleInSessionPool(), "FATAL", "08006"),
    (errors.ClientMaxReached(100), "FATAL", "53300"),
    (errors.RuleClientMaxReached(100, "orders", "app"), "FATAL", "53300"),
    (errors.MemoryShort(900, 800), "FATAL", "53200"),
    (errors.PoolTimeout(4000, 30, 12), "FATAL", "53300"),
    (errors.ServerConnectFailed(cause="10.0.0.1:5432: timed out"), "FATAL", "08006"),
    (errors.ServerAuthentication(cause="wants GSSAPI"), "FATAL", "08006"),
    (errors.ServerProtocol(cause="message type 0x7f"), "FATAL", "08006"),
    (errors.ServerLost(), "FATAL", "08006"),
    (errors.PostgresError({"S": "FATAL", "C": "57P03", "M": "starting up"}), "FATAL", "57P03"),
    (errors.ConfigurationError("password of the rule cannot be used"), "FATAL", "F0000"),
    (errors.AdminShutdown(), "FATAL", "57P01"),
    (errors.DatabaseDisabled("app"), "FATAL", "55000"),
    (errors.InternalError(cause="KeyError: 3"), "FATAL", "XX000"),
]  # fmt: skip

GROUPS = {
    errors.GpoolerError, errors.ClientFault, errors.TooManyConnections, errors.ServerFault,
}  # fmt: skip


def test_every_class_of_the_tree_has_an_example() -> None:
    classes = {
        c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.GpoolerError)
    }
    assert classes - GROUPS == {type(error) for error, _, _ in EXAMPLES}


@pytest.mark.parametrize(("error", "severity", "sqlstate"), EXAMPLES, ids=lambda v: type(v).__name__)
def test_error_carries_severity_sqlstate_and_a_text_in_the_style_of_postgresql(
    error: errors.GpoolerError, severity: str, sqlstate: str
) -> None:
    fields = error.fields()
    assert fields["S"] == severity
    assert fields["C"] == sqlstate
    assert fields["M"] == error.message == str(error)
    assert error.message[0].islower()
    assert not error.message.endswith(".")
    for sentence in (error.detail, error.hint):
        assert not sentence or (sentence[0].isupper() and sentence.endswith("."))


def test_the_cause_goes_to_the_log_and_never_to_the_client() -> None:
    error = errors.AuthenticationFailed("app", cause="no such user in the rule")
    assert "no such user" in error.log_text()
    assert all("no such user" not in value for value in error.fields().values())


def test_failed_logins_look_the_same_whatever_the_cause() -> None:
    kinds = (errors.AuthenticationFailed, errors.AuthenticationUndecided)
    texts = {str(kind("app", cause=cause).fields()) for kind in kinds for cause in ("a", "b")}
    assert len(texts) == 1


def test_pool_timeout_says_pool_size_and_queue_length() -> None:
    message = errors.PoolTimeout(4000, 30, 12).message
    assert "4000 ms" in message
    assert "pool size 30" in message
    assert "queue length 12" in message


def test_detail_and_hint_are_sent_only_when_there_are_any() -> None:
    bare = errors.ServerLost().fields()
    assert "D" not in bare
    assert "H" not in bare
    full = errors.GpoolerError("x", detail="Detail.", hint="Hint.").fields()
    assert (full["D"], full["H"]) == ("Detail.", "Hint.")


def test_an_error_of_the_server_keeps_its_fields_and_order() -> None:
    fields = {"S": "FATAL", "V": "FATAL", "C": "53300", "M": "sorry, too many clients already", "F": "proc.c"}
    error = errors.PostgresError(fields)
    assert list(error.fields().items()) == list(fields.items())
    assert error.server_sqlstate == "53300"
    assert error.log_text() == "FATAL 53300: sorry, too many clients already"


def test_an_error_of_the_server_without_fields_is_still_an_error() -> None:
    error = errors.PostgresError({})
    assert (error.server_severity, error.server_sqlstate, error.message) == (
        "FATAL",
        "XX000",
        "unknown error",
    )
