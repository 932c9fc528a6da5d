"""What gpooler tells Prometheus, as a scraper sees it."""

from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 30  # against hanging


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response."""

    status: int
    headers: HTTPMessage
    body: str


class Scraper:
    """Asks the port of ``[metrics]``; routes are those of one database and user."""

    def __init__(self, port: int, database: str = "app", user: str = "trust_user") -> None:
        self.port = port
        self._route = {"database": database, "user": user}

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """One request on a connection of its own."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read().decode())
        finally:
            connection.close()

    def scrape(self) -> "Scraped":
        """All metrics now."""
        answer = self.get("/metrics")
        assert answer.status == 200, answer.body
        return Scraped(answer.body, self._route)

    def route(self, name: str, **labels: str) -> float:
        """One value of the route, now; see Scraped.route."""
        return self.scrape().route(name, **labels)


class Scraped:
    """The values of one scrape."""

    def __init__(self, text: str, route: dict[str, str]) -> None:
        self._route = route
        self.values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """A metric of gpooler as a whole; 0 where it is not told."""
        return self.values.get((name, frozenset(labels.items())), 0.0)

    def route(self, name: str, **labels: str) -> float:
        """A metric of the route, without ``gpooler_``; 0 where it is not told."""
        return self.value(f"gpooler_{name}", **self._route, **labels)

    def pool(self, name: str) -> float:
        """A metric of the route under the name that pgbouncer_exporter gives it."""
        return self.value(f"pgbouncer_pools_{name}", **self._route)

    def totals(self, name: str) -> float:
        """A metric of the database under the name that pgbouncer_exporter gives it."""
        return self.value(f"pgbouncer_stats_totals_{name}", database=self._route["database"])
