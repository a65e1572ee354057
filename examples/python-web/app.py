"""A small web server: says which copy answers. Standard library only."""

import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# `web-0` under Optimus.
COPY = "{OPTIMUS_WORKLOAD}-{OPTIMUS_INDEX}".format(**os.environ) if "OPTIMUS_INDEX" in os.environ else f"pid {os.getpid()}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/healthz":
            self.answer(200, "ok\n")
        elif self.path == "/":
            self.answer(200, f"hello from {COPY}\n")
        else:
            self.answer(404, "not found\n")

    def answer(self, status, text):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        # One line a request on stdout, at once.
        print(f"{self.client_address[0]} {format % args}", flush=True)


def main():
    port = int(os.environ.get("PORT", "8000"))
    server = ThreadingHTTPServer(("", port), Handler)

    def stop(signum, frame):
        print(f"{signal.Signals(signum).name}: no new requests", flush=True)
        # shutdown() waits for the loop below, which runs in this very thread.
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"{COPY} listens on port {port}", flush=True)
    server.serve_forever()
    server.server_close()
    print("bye", flush=True)


if __name__ == "__main__":
    main()
