"""Loads a configuration: files → model → checks → ``Config``, or every problem at once."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpooler.auth.hba import Hba
from gpooler.config import certificates, checks
from gpooler.config.exposure import files_with_secrets, mode_for_others
from gpooler.config.field import about
from gpooler.config.hba import read_hba
from gpooler.config.model import (
    Config,
    Document,
    DropOptions,
    GroupRule,
    Listen,
    Rule,
    Service,
    Storage,
)
from gpooler.config.options import SECRET_KEYS, submodel
from gpooler.config.problems import ConfigError, Problem, quoted_key
from gpooler.config.rule import GroupBody, Section
from gpooler.config.source import Origin, Source, read_file, read_secret, read_text
from gpooler.config.storage import parse_endpoints, socket_path
from gpooler.config.validate import Validated, as_written, validate
from gpooler.config.words import StorageType


@dataclass(frozen=True, slots=True)
class Loaded:
    """A usable configuration, and what its writer should know about it."""

    config: Config
    warnings: tuple[Problem, ...]
    departures: tuple[str, ...]  # options left at a default that is not Odyssey's: "pool_discard: why"


def load(path: Path, environ: Mapping[str, str] | None = None) -> Loaded:
    """The configuration in the file ``path``; raises ``ConfigError`` with every problem.

    ``environ`` is where ``{ env = … }`` secrets are; the process's own when None.
    """
    return _load(read_file(path, SECRET_KEYS), os.environ if environ is None else environ)


def load_text(text: str, environ: Mapping[str, str] | None = None, file: str = "config.toml") -> Loaded:
    """As ``load``, of a text; ``file`` is its name in messages."""
    source = read_text(text, file, Path.cwd(), SECRET_KEYS)
    return _load(source, os.environ if environ is None else environ)


def _load(source: Source, environ: Mapping[str, str]) -> Loaded:
    if source.problems:  # what is missing may stand in the part that could not be read
        raise ConfigError(tuple(source.problems))
    result = validate(source, lambda kind, name: read_secret(kind, name, environ))
    if result.document is not None:
        _cross_check(source, result, result.document)
        hba, problems = read_hba(source, result.document)
        result.errors.extend(problems)
    if result.errors or result.document is None:
        raise ConfigError(_sorted(source, result.errors))
    _warn_of_exposed_files(source, result, result.document)
    config = _config(source, result.document, hba)
    return Loaded(config, _sorted(source, result.warnings), tuple(_departures(config)))


def _cross_check(source: Source, result: Validated, document: Document) -> None:
    names = checks.Names(
        *(
            defined if isinstance(defined := source.values.get(word), dict) else ()
            for word in ("storage", "shared_pool", "ldap_endpoint")
        )
    )
    file_errors, file_warnings = certificates.findings(document)
    for finding in (*checks.errors(document, names), *file_errors):
        if not finding.follows_from(result.broken):
            path = as_written(finding.path, result.single)
            result.errors.append(source.problem(path, finding.text, finding.suggestion))
    for finding in (*checks.warnings(document), *file_warnings):
        path = as_written(finding.path, result.single)
        result.warnings.append(source.problem(path, finding.text))


def _warn_of_exposed_files(source: Source, result: Validated, document: Document) -> None:
    """Each file once, at the first secret in it."""
    seen: set[str] = set()
    for found, file in files_with_secrets(document):
        path = as_written(found, result.single)
        origin = source.origin(path)
        name = file or (origin.file if origin else source.file)
        if name not in seen and (mode := mode_for_others(name)):
            text = f"is a secret in {name}, which every user of this machine may read (mode {mode})"
            result.warnings.append(source.problem(path, text))
        seen.add(name)


def _sorted(source: Source, problems: list[Problem]) -> tuple[Problem, ...]:
    """In the order of the files; the same problem once."""
    ranks = {origin.file: origin.rank for origin in source.origins.values()}
    behind = max(ranks.values(), default=0) + 1  # files of another kind
    unique = dict.fromkeys(problems)
    return tuple(
        sorted(
            unique,
            key=lambda p: (ranks.get(p.file, behind), "" if p.file in ranks else p.file, p.line or 0),
        )
    )


def _fields(table: Section) -> dict[str, Any]:
    return {name: getattr(table, name) for name in type(table).model_fields}


def _config(source: Source, document: Document, hba: Hba | None) -> Config:
    service = _service(document.service)
    return Config.model_construct(
        service=service,
        logging=document.logging,
        performance=document.performance,
        limits=document.limits,
        metrics=document.metrics,
        routing=document.routing,
        query_parsing=document.query_parsing,
        listen=tuple(_listeners(document, service.unix_socket_dir)),
        storage=_storages(document, service.unix_socket_dir),
        shared_pool=dict(document.shared_pool),
        ldap_endpoint=dict(document.ldap_endpoint),
        rules=tuple(_rules(source, document)),
        hba=hba,
        soft_oom=document.soft_oom,
    )


def _service(service: Service) -> Service:
    """With the drop options under their one name."""
    old: DropOptions | None = service.online_restart_drop_options
    if old is None:
        return service
    return service.model_copy(update={"conn_drop_options": old, "online_restart_drop_options": None})


def _listeners(document: Document, directory: str | None) -> Iterator[Listen]:
    for number, body in enumerate(document.listen):
        path = socket_path(directory, body.port) if body.host is None and directory else None
        fields = _fields(body)
        yield Listen.model_construct(body.model_fields_set, **fields, unix_path=path, number=number)


def _storages(document: Document, directory: str | None) -> dict[str, Storage]:
    return {
        name: Storage.model_construct(
            body.model_fields_set,
            **_fields(body),
            name=name,
            endpoints=()
            if body.type is StorageType.LOCAL
            else parse_endpoints(body.host, body.port, directory),
        )
        for name, body in document.storage.items()
    }


def _rules(source: Source, document: Document) -> list[Rule]:
    """In the order of the files, which is not the order in which the tables nest."""
    found: list[tuple[Origin, Rule]] = []
    for path, database, user, body in checks.rules_of(document):
        word, key = str(path[2]), str(path[3])
        is_array = isinstance(source.values["database"][database][word][key], list)
        parts = [database, key] if word == "user" else [database, word, key]
        name = ".".join(quoted_key(part) for part in parts) + (f"[{path[-1]}]" if is_array else "")
        group = None if word == "user" else key
        kind = GroupRule if isinstance(body, GroupBody) else Rule
        rule = kind.model_construct(
            body.model_fields_set, **_fields(body), name=name, database=database, user=user, group=group
        )
        origin = source.origin(path if is_array else path[:-1])
        if origin is None:
            raise AssertionError(f"rule {name} stands nowhere")
        found.append((origin, rule))
    return [rule for _, rule in sorted(found, key=lambda item: item[0])]


def _departures(config: Config) -> Iterator[str]:
    """Options left at a default that differs from Odyssey's on purpose, each once."""
    sections: list[Section] = [
        config.service,
        config.logging,
        config.performance,
        config.limits,
        *config.rules,
    ]
    seen: set[str] = set()
    for section in sections:
        for name, known in type(section).model_fields.items():
            if name in section.model_fields_set or known.json_schema_extra is None or submodel(known):
                continue
            if (reason := about(known).departure) and name not in seen:
                seen.add(name)
                yield f"{name}: {reason}"


__all__ = ["ConfigError", "Loaded", "Problem", "load", "load_text"]
