"""Sessions through gpooler and on PostgreSQL itself, compared message by message."""
