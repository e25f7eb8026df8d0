#!/bin/sh
# A handler for mode = "once": writes each message into a file of its own.
#
#   [consumer.handler]
#   type = "command"
#   argv = ["examples/handlers/once.sh"]
#   env = { STORE = "/var/lib/orders" }
#
# The message is data: its body is standard input, its id and key are variables.
# None of them is ever part of a command line that the shell reads.
set -eu

: "${STORE:?set STORE in env of [consumer.handler]}"

# The same message comes with the same key, even when an earlier try was cut
# short. A key may hold what a file name cannot, so its hash is the name.
name=$(printf %s "$ACKONCE_IDEMPOTENCY_KEY" | sha256sum | cut -c 1-64)
if [ -e "$STORE/$name" ]; then
    exit 0
fi

# 65: this message will never be right. It is dead-lettered at once.
if [ "$ACKONCE_BODY_BYTES" -eq 0 ]; then
    echo "an order without a body" >&2
    exit 65
fi

# 75: it may be right later. It is tried again after a while.
if [ ! -d "$STORE" ]; then
    echo "$STORE is not there at the moment" >&2
    exit 75
fi

# Whole or not at all, whatever happens meanwhile.
unfinished=$(mktemp "$STORE/.unfinished.XXXXXX")
trap 'rm -f "$unfinished"' EXIT
cat >"$unfinished"
mv "$unfinished" "$STORE/$name"
