#!/usr/bin/env python3
"""A handler for mode = "stream": as once.py, by one process for many messages.

    [consumer.handler]
    type = "command"
    mode = "stream"
    argv = ["examples/handlers/stream.py"]
    env = { DATABASE = "/var/lib/orders.sqlite" }

Standard output is for answers alone, one line each. What else there is to say
goes to standard error, which the daemon logs.
"""

import json
import os
import sqlite3
import sys


def say(line: dict) -> None:
    # Flushed: the daemon waits for each line.
    print(json.dumps(line), flush=True)


def apply(database: sqlite3.Connection, message: dict) -> dict:
    try:
        # "body" holds text, "body_base64" what is none.
        order = json.loads(message["body"])
        customer, amount = str(order["customer"]), int(order["amount"])
    except (ValueError, KeyError, TypeError) as error:
        return {"outcome": "reject", "error": f"not an order: {error!r}"}
    try:
        with database:
            is_new = database.execute(
                "insert into applied values (?) on conflict do nothing", (message["key"],)
            ).rowcount
            if is_new:
                database.execute(
                    "insert into account values (?, ?)"
                    " on conflict (customer) do update set total = total + excluded.total",
                    (customer, amount),
                )
    except sqlite3.OperationalError as error:
        return {"outcome": "retry", "error": f"the database: {error}", "retry_after_ms": 5000}
    return {"outcome": "done"}


def main() -> None:
    # What takes long is done once, before the first message.
    database = sqlite3.connect(os.environ["DATABASE"], timeout=10)
    with database:
        database.execute("create table if not exists applied (key text primary key)")
        database.execute(
            "create table if not exists account (customer text primary key, total int)"
        )
    say({"ready": True})
    # Ends when the daemon closes standard input.
    for line in sys.stdin:
        message = json.loads(line)
        say({"id": message["id"], **apply(database, message)})


if __name__ == "__main__":
    main()
