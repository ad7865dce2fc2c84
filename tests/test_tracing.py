"Traces of a picture's way, received by OTLP over HTTP; without a collector nothing, and one that is away costs nothing."

import base64
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from serving import neptune, running, until

pytest.importorskip("opentelemetry.sdk")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector(monkeypatch):
    "A receiver of OTLP over HTTP, and the spans that it has got."
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans, services = [], set()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    services.update(
                        a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
                    )
                    spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    yield spans, services
    server.shutdown()
    server.server_close()


def attributes(span):
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_span_for_each_stage_of_a_picture(model, collector, tmp_path):
    spans, services = collector
    with running(model, tmp_path / "log", demo=False) as url, httpx.Client(base_url=url, timeout=60) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        predict = client.post("/predict", files={"image": neptune()}, headers=headers)
        explain = client.post("/explain", files={"image": neptune()})
        data = [base64.b64encode(neptune()).decode()] * 2
        tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": data}
        infer = client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
        bad = client.post("/predict", files={"image": b"Dear planet"})
        client.get("/ready")
        assert [one.status_code for one in (predict, explain, infer, bad)] == [200, 200, 200, 415]
        until(lambda: sum(span.kind == 2 for span in spans) == 4)
        roots = {attributes(span)["request_id"]: span for span in spans if span.kind == 2}
    stages = {number: [s for s in spans if s.parent_span_id == root.span_id] for number, root in roots.items()}
    way = ["read", "queue", "open", "decode", "infer", "statistics"]
    for answer, names in (
        (predict, [*way, "log"]),
        (explain, [*way, "log", "explain"]),
        (infer, ["read", *way[1:] * 2, "log", "log"]),
        (bad, ["read", "queue", "open"]),
    ):
        number = answer.headers["x-request-id"]
        root, inner = roots[number], stages[number]
        assert sorted(span.name for span in inner) == sorted(names)
        assert attributes(root)["http.response.status_code"] == answer.status_code
        assert (attributes(root).get("error.type") == "not_an_image") == (answer is bad)
        for span in inner:
            assert span.trace_id == root.trace_id
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
    root = roots[predict.headers["x-request-id"]]
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.name) == (TRACE, PARENT, "POST /predict")
    assert abs(root.start_time_unix_nano / 1e9 - time.time()) < 600 and services == {"celestial"}
    assert len(spans) == sum(map(len, stages.values())) + 4, "and none of /ready"
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    traced = {line["request_id"]: line["trace_id"] for line in lines if "trace_id" in line}
    assert traced == {number: root.trace_id.hex() for number, root in roots.items()}


def test_a_collector_that_is_away_costs_no_request(model, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://192.0.2.1:4318")  # of RFC 5737: nobody answers
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with running(model, tmp_path / "log", demo=False) as url, httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(20):
            assert client.post("/predict", files={"image": neptune()}).status_code == 200
        took = client.post("/predict", files={"image": neptune()}).elapsed.total_seconds()
        assert took < 5, "less than a connection that times out"


def test_nothing_is_imported_without_a_collector(model):
    "FastAPI itself imports OpenTelemetry's API where it is installed, so this is about the SDK and the exporter."
    code = f"import sys; from celestial_ml.serve.api import build_app; build_app({str(model)!r}); print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
