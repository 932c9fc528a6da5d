"""Constants of the frontend/backend protocol, version 3, under the documentation's names.

Chapter "Frontend/Backend Protocol", section "Message Formats".
"""

from typing import Final

# --- startup packets: the word after the length ---


def protocol(major: int, minor: int) -> int:
    """The version word of a startup packet."""
    return major << 16 | minor


PROTOCOL_3_0: Final = protocol(3, 0)
PROTOCOL_3_2: Final = protocol(3, 2)
PROTOCOL_MAJOR: Final = 3
PROTOCOL_LATEST_MINOR: Final = 2

CANCEL_REQUEST_CODE: Final = protocol(1234, 5678)
SSL_REQUEST_CODE: Final = protocol(1234, 5679)
GSSENC_REQUEST_CODE: Final = protocol(1234, 5680)

REFUSED: Final = b"N"  # one byte, no message: the answer to SSLRequest and GSSENCRequest
SSL_ACCEPTED: Final = b"S"

# --- frontend messages ---
BIND: Final = b"B"
CLOSE: Final = b"C"
DESCRIBE: Final = b"D"
EXECUTE: Final = b"E"
FLUSH: Final = b"H"
FUNCTION_CALL: Final = b"F"
PARSE: Final = b"P"
PASSWORD_MESSAGE: Final = b"p"  # also SASLInitialResponse, SASLResponse, GSSResponse
QUERY: Final = b"Q"
SYNC: Final = b"S"
TERMINATE: Final = b"X"

# --- both directions ---
COPY_DATA: Final = b"d"
COPY_DONE: Final = b"c"
COPY_FAIL: Final = b"f"  # frontend only

# --- backend messages ---
AUTHENTICATION: Final = b"R"
BACKEND_KEY_DATA: Final = b"K"
BIND_COMPLETE: Final = b"2"
CLOSE_COMPLETE: Final = b"3"
COMMAND_COMPLETE: Final = b"C"
COPY_BOTH_RESPONSE: Final = b"W"
COPY_IN_RESPONSE: Final = b"G"
COPY_OUT_RESPONSE: Final = b"H"
DATA_ROW: Final = b"D"
EMPTY_QUERY_RESPONSE: Final = b"I"
ERROR_RESPONSE: Final = b"E"
FUNCTION_CALL_RESPONSE: Final = b"V"
NEGOTIATE_PROTOCOL_VERSION: Final = b"v"
NO_DATA: Final = b"n"
NOTICE_RESPONSE: Final = b"N"
NOTIFICATION_RESPONSE: Final = b"A"
PARAMETER_DESCRIPTION: Final = b"t"
PARAMETER_STATUS: Final = b"S"
PARSE_COMPLETE: Final = b"1"
PORTAL_SUSPENDED: Final = b"s"
READY_FOR_QUERY: Final = b"Z"
ROW_DESCRIPTION: Final = b"T"

# --- the first word of an Authentication message ---
AUTHENTICATION_OK: Final = 0
AUTHENTICATION_KERBEROS_V5: Final = 2
AUTHENTICATION_CLEARTEXT_PASSWORD: Final = 3
AUTHENTICATION_MD5_PASSWORD: Final = 5
AUTHENTICATION_GSS: Final = 7
AUTHENTICATION_GSS_CONTINUE: Final = 8
AUTHENTICATION_SSPI: Final = 9
AUTHENTICATION_SASL: Final = 10
AUTHENTICATION_SASL_CONTINUE: Final = 11
AUTHENTICATION_SASL_FINAL: Final = 12

# --- the byte of ReadyForQuery ---
IDLE: Final = b"I"
IN_TRANSACTION: Final = b"T"
IN_FAILED_TRANSACTION: Final = b"E"
