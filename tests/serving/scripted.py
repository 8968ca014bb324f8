"""A server that answers each request as the test says: what a model server does on bad days."""

import json
import socket
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

METADATA = {
    "model_spec": {"name": "m", "signature_name": "", "version": "7"},
    "metadata": {
        "signature_def": {
            "signature_def": {
                "serving_default": {
                    "inputs": {
                        "image": {
                            "dtype": "DT_FLOAT",
                            "tensor_shape": {
                                "dim": [{"size": s} for s in ("-1", "2", "2", "1")],
                                "unknown_rank": False,
                            },
                        }
                    },
                    "outputs": {
                        "probabilities": {
                            "dtype": "DT_FLOAT",
                            "tensor_shape": {"dim": [{"size": "-1"}, {"size": "2"}]},
                        }
                    },
                    "method_name": "tensorflow/serving/predict",
                }
            }
        }
    },
}
GOOD = (200, {"outputs": [[0.25, 0.75]]})


@contextmanager
def scripted(*answers):
    """Answers to the POSTs, in order; the last one again and again. GET gives the metadata.

    An answer: ``(status, body or text)``, ``(status, body, headers)``, ``"reset"``, ``"cut"`` (in
    the middle of the body) or ``"silence"``.

    Yields:
        ``(url, seen)``: of the model; the bodies of the POSTs so far.
    """
    seen, done = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.answer(200, METADATA)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            what = answers[min(len(seen), len(answers) - 1)]
            seen.append(body)
            if what == "reset":
                # Closing with this option sends RST.
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True
            elif what == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"outputs": [[0.')
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif what == "silence":
                done.wait(20)
                self.close_connection = True
            else:
                self.answer(*what)

        def answer(self, status, body, headers=None):
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def finish(self):
            try:
                super().finish()
            except (OSError, ValueError):
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/models/m", seen
    finally:
        done.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
