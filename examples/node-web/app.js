// A small web server: says which copy answers. No packages needed.
"use strict";

const http = require("node:http");

const { OPTIMUS_WORKLOAD: workload, OPTIMUS_INDEX: index } = process.env;
// `web-0` under Optimus.
const copy = index === undefined ? `pid ${process.pid}` : `${workload}-${index}`;
const port = Number(process.env.PORT || 8000);

const server = http.createServer((request, response) => {
  const [status, text] =
    request.url === "/" ? [200, `hello from ${copy}\n`] : request.url === "/healthz" ? [200, "ok\n"] : [404, "not found\n"];
  response.writeHead(status, { "content-type": "text/plain; charset=utf-8" });
  response.end(text);
  console.log(`${request.socket.remoteAddress} ${request.method} ${request.url} ${status}`);
});

server.listen(port, () => console.log(`${copy} listens on port ${port}`));

for (const signal of ["SIGTERM", "SIGINT"]) {
  process.on(signal, () => {
    console.log(`${signal}: no new requests`);
    server.close(() => console.log("bye"));
    server.closeIdleConnections();
  });
}
