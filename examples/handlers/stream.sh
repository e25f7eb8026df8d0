#!/usr/bin/env bash
# A handler for mode = "stream": as once.sh, by one process for many messages.
# Needs jq, which takes messages apart: no part of one is read by the shell.
#
#   [consumer.handler]
#   type = "command"
#   mode = "stream"
#   argv = ["examples/handlers/stream.sh"]
#   env = { STORE = "/var/lib/orders" }
set -euo pipefail

: "${STORE:?set STORE in env of [consumer.handler]}"
command -v jq >/dev/null || {
    echo "jq is not installed" >&2
    exit 1
}

# answer ID OUTCOME [ERROR]
answer() {
    jq -cn --argjson id "$1" --arg outcome "$2" --arg error "${3-}" \
        '{id: $id, outcome: $outcome, error: $error}'
}

echo '{"ready":true}'
while IFS= read -r line; do
    id=$(jq .id <<<"$line")
    name=$(jq -rj .key <<<"$line" | sha256sum | cut -c 1-64)
    if [[ -e $STORE/$name ]]; then
        answer "$id" "done"
        continue
    fi
    if [[ ! -d $STORE ]]; then
        answer "$id" retry "$STORE is not there at the moment"
        continue
    fi
    unfinished=$(mktemp "$STORE/.unfinished.XXXXXX")
    jq -rj 'if .body_base64 then .body_base64 | @base64d else .body end' <<<"$line" >"$unfinished"
    if [[ ! -s $unfinished ]]; then
        rm "$unfinished"
        answer "$id" reject "an order without a body"
        continue
    fi
    mv "$unfinished" "$STORE/$name"
    answer "$id" "done"
done
