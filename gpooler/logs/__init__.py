"""Where log lines go: files, standard output, syslog, directly or through a writer thread."""
