#!/usr/bin/env python3
"""A handler for mode = "once": adds each order's amount to its customer's account.

    [consumer.handler]
    type = "command"
    argv = ["examples/handlers/once.py"]
    env = { DATABASE = "/var/lib/orders.sqlite" }

The effect and the key of the message are written in one transaction, and the
key is unique: a message that comes twice takes effect once.
"""

import json
import os
import sqlite3
import sys

BAD_INPUT = 65  # dead-lettered at once
TRY_LATER = 75  # tried again after a while
BAD_SETUP = 78  # not the message's fault: the consumer waits until it is mended


def main() -> int:
    try:
        order = json.load(sys.stdin.buffer)
        customer, amount = str(order["customer"]), int(order["amount"])
    except (ValueError, KeyError, TypeError) as error:
        print(f"not an order: {error!r}", file=sys.stderr)
        return BAD_INPUT
    if "DATABASE" not in os.environ:
        print("set DATABASE in env of [consumer.handler]", file=sys.stderr)
        return BAD_SETUP
    try:
        database = sqlite3.connect(os.environ["DATABASE"], timeout=10)
        with database:
            database.execute("create table if not exists applied (key text primary key)")
            database.execute(
                "create table if not exists account (customer text primary key, total int)"
            )
            key = os.environ["ACKONCE_IDEMPOTENCY_KEY"]
            is_new = database.execute(
                "insert into applied values (?) on conflict do nothing", (key,)
            ).rowcount
            if is_new:
                database.execute(
                    "insert into account values (?, ?)"
                    " on conflict (customer) do update set total = total + excluded.total",
                    (customer, amount),
                )
    except sqlite3.OperationalError as error:
        print(f"the database: {error}", file=sys.stderr)
        return TRY_LATER
    return 0


if __name__ == "__main__":
    sys.exit(main())
