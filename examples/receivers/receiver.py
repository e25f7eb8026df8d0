#!/usr/bin/env python3
"""A receiver that honours the idempotency key, with nothing but Python.

    receiver.py PORT DATABASE

The key goes into a table with a unique index, in the transaction that has the
effect. So a request that comes again, because an answer was lost or the sender
died, finds its key there and changes nothing.

    POST  201  the effect is there now
          200  it was there before
          422  the key is known with another body: dead-lettered by ackonce
          400  no key
          401  the signature is wrong (with SIGNING_SECRET=whsec_... only)
          500  the database failed: ackonce tries again, with the same key
    GET   every key with its number of effects, as JSON
"""

import base64
import hashlib
import hmac
import json
import os
import sqlite3
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SCHEMA = """
CREATE TABLE IF NOT EXISTS applied (key TEXT PRIMARY KEY, fingerprint BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS effect (key TEXT NOT NULL, body BLOB NOT NULL);
"""

# Largest body that is read, in bytes.
BODY_MAX = 32 << 20

# A signature that is older, or from the future, is refused.
TOLERANCE_S = 300


def connect(path):
    connection = sqlite3.connect(path, timeout=5, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def apply(path, key, body):
    """The status for one request."""
    fingerprint = hashlib.sha256(body).digest()
    connection = connect(path)
    try:
        connection.execute("BEGIN IMMEDIATE")
        known = connection.execute(
            "SELECT fingerprint FROM applied WHERE key = ?", (key,)
        ).fetchone()
        if known is not None:
            connection.execute("ROLLBACK")
            return 200 if known[0] == fingerprint else 422
        connection.execute("INSERT INTO applied VALUES (?, ?)", (key, fingerprint))
        # The effect: in the same transaction as the key.
        connection.execute("INSERT INTO effect VALUES (?, ?)", (key, body))
        connection.execute("COMMIT")
        return 201
    finally:
        connection.close()


def is_signed(headers, body, secret):
    """Standard Webhooks: any one of the signatures may be ours."""
    id, seconds = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not seconds.isdigit() or abs(time.time() - int(seconds)) > TOLERANCE_S:
        return False
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{id}.{seconds}.".encode() + body
    wanted = "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    signatures = headers.get("webhook-signature", "").split(" ")
    return any(hmac.compare_digest(wanted, one) for one in signatures)


class Handler(BaseHTTPRequestHandler):
    # Connections are kept between requests.
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_POST(self):
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > BODY_MAX:
            self.close_connection = True
            return self.answer(413 if length.isdigit() else 411)
        body = self.rfile.read(int(length))
        secret = os.environ.get("SIGNING_SECRET")
        if secret and not is_signed(self.headers, body, secret):
            return self.answer(401)
        key = self.headers.get("idempotency-key")
        if not key:
            return self.answer(400)
        try:
            self.answer(apply(self.server.database, key, body))
        except sqlite3.Error as error:
            self.answer(500, str(error).encode())

    def do_GET(self):
        connection = connect(self.server.database)
        rows = connection.execute("SELECT key, count(*) FROM effect GROUP BY key").fetchall()
        connection.close()
        self.answer(200, json.dumps(dict(rows)).encode())

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: receiver.py PORT DATABASE")
    port, database = int(sys.argv[1]), sys.argv[2]
    connection = connect(database)
    connection.executescript(SCHEMA)
    connection.close()
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.database = database
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
