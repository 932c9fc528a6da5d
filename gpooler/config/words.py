"""The enumerated values of options, spelled as in the configuration."""

from enum import IntEnum, StrEnum


class Authentication(StrEnum):
    """How a client proves who it is."""

    NONE = "none"
    BLOCK = "block"
    CLEAR_TEXT = "clear_text"
    MD5 = "md5"
    SCRAM_SHA_256 = "scram-sha-256"
    PEER = "peer"
    CERT = "cert"
    EXTERNAL = "external"


class Pool(StrEnum):
    """How long a client keeps a server."""

    SESSION = "session"
    TRANSACTION = "transaction"
    STATEMENT = "statement"


class Pause(IntEnum):
    """What operators keep from servers; the relay's numbers (``relay/engine.pxd: PauseMode``)."""

    NONE = 0
    KEEP = 1  # nobody is given one
    CLOSE = 2  # and those that become free are closed


class SessionState(StrEnum):
    """What becomes of session state that cannot go from server to server."""

    PIN = "pin"
    REFUSE = "refuse"
    ALLOW = "allow"


class SessionStateCheck(StrEnum):
    """When a server is asked what state its session has."""

    OFF = "off"
    OPAQUE = "opaque"
    ALWAYS = "always"


class PoolRouting(StrEnum):
    """Who may use a rule."""

    CLIENT_VISIBLE = "client_visible"
    INTERNAL = "internal"


class ConnectionType(StrEnum):
    """The kind of a client's connection; of a client HOSTSSL, HOSTNOSSL or LOCAL, of a rule all."""

    DEFAULT = "default"
    HOST = "host"
    HOSTSSL = "hostssl"
    HOSTNOSSL = "hostnossl"
    LOCAL = "local"


class Role(StrEnum):
    """Rights in the console."""

    ADMIN = "admin"
    STAT = "stat"
    NOTALLOW = "notallow"


class Tls(StrEnum):
    """TLS modes, as libpq's ``sslmode``."""

    DISABLE = "disable"
    ALLOW = "allow"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify_ca"
    VERIFY_FULL = "verify_full"


class StorageType(StrEnum):
    """What a storage is: PostgreSQL hosts, or the console."""

    REMOTE = "remote"
    LOCAL = "local"


class TargetSessionAttrs(StrEnum):
    """Which of several hosts will do."""

    ANY = "any"
    READ_WRITE = "read-write"
    READ_ONLY = "read-only"
    PREFER_STANDBY = "prefer-standby"


class BalancingMethod(StrEnum):
    """How one of several hosts is chosen."""

    ROUNDROBIN = "roundrobin"
    LEASTCONN = "leastconn"
    WEIGHTED = "weighted"
    WEIGHTEDLEASTCONN = "weightedleastconn"
    RESPONSETIME = "responsetime"


class SyslogFacility(StrEnum):
    """Facilities of syslog."""

    DAEMON = "daemon"
    USER = "user"
    LOCAL0 = "local0"
    LOCAL1 = "local1"
    LOCAL2 = "local2"
    LOCAL3 = "local3"
    LOCAL4 = "local4"
    LOCAL5 = "local5"
    LOCAL6 = "local6"
    LOCAL7 = "local7"


class QueryParsing(StrEnum):
    """How much of SQL is understood in passing."""

    DISABLED = "disabled"
    MINIMAL = "minimal"


class LdapScheme(StrEnum):
    """LDAP plain or over TLS."""

    LDAP = "ldap"
    LDAPS = "ldaps"


class TlsRecords(StrEnum):
    """Who seals and opens the records of clients by TLS 1.3 after the handshake."""

    GPOOLER = "gpooler"
    OPENSSL = "openssl"
