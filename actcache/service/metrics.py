"""The numbers of a service in Prometheus' text format, by its own client library; served over HTTP where asked for."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from actcache.errors import UsageError

if TYPE_CHECKING:
    from actcache.service.server import Server

_GAUGES = {
    "active_calls": "calls under way",
    "windows": "decoded windows in memory",
    "window_bytes": "bytes of decoded windows",
    "window_limit_bytes": "bound on them",
    "up_s": "seconds since the service began",
}
_COUNTERS = {
    "rows": "rows handed out",
    "row_bytes": "bytes of messages with rows",
    "object_bytes": "bytes of objects read",
    "refused": "calls without the right token",
    "windows_decoded": "windows decoded",
    "windows_reused": "windows asked for that were there",
    "windows_evicted": "windows thrown out to make room",
    "waited_for_room_s": "seconds that calls waited for room",
}


class _Collector:
    """Asks a service for its numbers whenever somebody scrapes."""

    def __init__(self, server: "Server") -> None:
        self._server = server

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._server.status()
        for name, said in _GAUGES.items():
            yield GaugeMetricFamily(f"actcache_{name}", said, value=status[name])
        for name, said in _COUNTERS.items():
            yield CounterMetricFamily(f"actcache_{name}", said, value=status[name])
        for name in ("calls", "failed"):
            family = CounterMetricFamily(f"actcache_{name}", f"{name}, by method", labels=["method"])
            for method, value in status[name].items():
                family.add_metric([method], value)
            yield family


def _registry(server: "Server") -> Any:
    try:
        from prometheus_client import CollectorRegistry
    except ImportError as error:
        raise UsageError(
            "metrics need the package prometheus-client: pip install 'actcache[serve]'"
        ) from error
    registry = CollectorRegistry()
    registry.register(_Collector(server))  # type: ignore[arg-type]
    return registry


def text(server: "Server") -> bytes:
    """All numbers, as Prometheus reads them."""
    registry = _registry(server)
    from prometheus_client import generate_latest

    return generate_latest(registry)


def serve_http(server: "Server", host: str, port: int) -> tuple[int, Any]:
    """Answer scrapes at http://host:port/metrics; returns the port, and what has `shutdown`. Without any proof of who asks.

    Raises:
        UsageError: the package is not installed, or the address cannot be used.
    """
    registry = _registry(server)
    from prometheus_client import start_http_server

    try:
        listening, _thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UsageError(f"cannot listen for scrapes on {host}:{port}: {error}") from error
    return listening.server_port, listening
