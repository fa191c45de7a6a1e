"""A collector for tests that speaks OTLP, over gRPC as the line does and over HTTP as Triton does; on free ports."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

_IDS = {"traceId", "spanId", "parentSpanId"}


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came, with ids in hex; `service` is who sent it."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, object]
    links: list[str]
    is_error: bool


@dataclass
class Receiver(TraceServiceServicer):
    """What came so far."""

    address: str = ""
    url: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)

    def of(self, trace: str) -> dict[str, ReceivedSpan]:
        """The spans of a trace by name; the last of a name."""
        return {span.name: span for span in list(self.spans) if span.trace == trace}

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            service = _values(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                self.spans += [_span(str(service), span) for span in scope.spans]

    def Export(self, request: ExportTraceServiceRequest, context: object) -> ExportTraceServiceResponse:  # noqa: N802
        del context
        self.take(request)
        return ExportTraceServiceResponse()


@contextmanager
def receiver(certificate: tuple[bytes, bytes] | None = None) -> Iterator[Receiver]:
    """Listen inside the block; gRPC by TLS with a key and a certificate."""
    found = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(found, server)
    if certificate is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([certificate]))
    found.address = f"127.0.0.1:{port}"
    server.start()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(found)) as page:
        found.url = f"http://127.0.0.1:{page.server_port}/v1/traces"
        thread = threading.Thread(target=page.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield found
        finally:
            page.shutdown()
            thread.join(10)
            server.stop(0).wait(10)


def _handler(found: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.headers["Content-Type"] == "application/json":
                found.take(json_format.ParseDict(_with_base64(json.loads(body)), ExportTraceServiceRequest()))
            else:
                found.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _with_base64(node: object) -> object:
    """OTLP's JSON has ids in hex (https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding), protobuf's not."""
    if isinstance(node, list):
        return [_with_base64(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        key: base64.b64encode(bytes.fromhex(value)).decode() if key in _IDS else _with_base64(value)
        for key, value in node.items()
    }


def _values(attributes: object) -> dict[str, object]:
    found = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind) if kind else None
        found[each.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


def _span(service: str, span: object) -> ReceivedSpan:
    return ReceivedSpan(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        [link.span_id.hex() for link in span.links],
        span.status.code == 2,
    )
