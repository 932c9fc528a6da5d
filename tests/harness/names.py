"""A host name whose addresses a test chooses, for gpooler alone: a library laid before the C library's."""

import subprocess
from pathlib import Path
from typing import Final

NAME: Final = "db.test"

RESOLVER: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* db.test has the addresses of the file GPOOLER_TEST_HOSTS, one a line; each question is noted. */
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **out)
{
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    const char *path = getenv("GPOOLER_TEST_HOSTS");
    char name[4096], line[64];
    struct addrinfo *all = NULL, **end = &all;
    FILE *file;
    if (!path || !node || strcmp(node, "db.test"))
        return real(node, service, hints, out);
    snprintf(name, sizeof name, "%s.asked", path);
    if ((file = fopen(name, "a"))) {
        fputc('.', file);
        fclose(file);
    }
    if (!(file = fopen(path, "r")))
        return EAI_AGAIN;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!real(line, service, hints, end))
            while (*end)
                end = &(*end)->ai_next;
    }
    fclose(file);
    *out = all;
    return all ? 0 : EAI_NONAME;
}
"""


class Names:
    """What NAME resolves to for a gpooler that is started with ``environment``; at first nothing answers."""

    def __init__(self, directory: Path, compiler: str) -> None:
        """Makes the library in ``directory``."""
        source, library = directory / "resolver.c", directory / "resolver.so"
        source.write_text(RESOLVER)
        command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True, timeout=60)
        self._hosts = directory / "hosts"
        self._asked = directory / "hosts.asked"
        self.environment = {"LD_PRELOAD": str(library), "GPOOLER_TEST_HOSTS": str(self._hosts)}

    def set(self, *addresses: str) -> None:
        """The answer from now on; without an address the resolver does not answer."""
        if not addresses:
            self._hosts.unlink(missing_ok=True)
            return
        new = self._hosts.with_suffix(".new")
        new.write_text("".join(f"{address}\n" for address in addresses))
        new.replace(self._hosts)  # at once: gpooler may ask at any moment

    @property
    def questions(self) -> int:
        """How often the name was asked for."""
        return self._asked.stat().st_size if self._asked.exists() else 0
