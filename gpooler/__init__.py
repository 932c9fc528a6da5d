"""gpooler, a PostgreSQL connection pooler and request router."""

__version__ = "0.1.0"
