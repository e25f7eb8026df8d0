# shellcheck shell=bash
# What script/systemd-test tests, in this order: each begins where the one before
# it ended, and begins by bringing about what it needs. Sourced, never run.
# SC2154: scratch, here and the URLs are the script's; SC2016: ${...} is dpkg's.
# shellcheck disable=SC2154,SC2016

unit=ackonce.service
credentials=/etc/ackonce/credentials
drop_in=/etc/systemd/system/$unit.d/test.conf
certificates_drop_in=/etc/systemd/system/$unit.d/certificates.conf

# same ACTUAL EXPECTED WHAT
same() {
    [[ $1 == "$2" ]] || fail "$3: $1 instead of $2"
}

# has TEXT PATTERN WHAT: whether a line of the text has the pattern in it.
has() {
    grep --quiet --extended-regexp -- "$2" <<<"$1" || fail "$3: nothing like '$2' in: $1"
}

# property NAME [UNIT]: what systemd knows of the service.
property() {
    inside systemctl show --value --property="$1" "${2:-$unit}"
}

is() {
    [[ $(property "$1") == "$2" ]]
}

journal() {
    inside journalctl --quiet --no-pager --output=cat --unit="$unit" "$@"
}

# said PATTERN: whether the journal has such a line since the mark.
said() {
    journal --since="$mark" | grep --quiet --extended-regexp -- "$1"
}

set_mark() {
    mark=@$(date +%s.%6N)
}

# starts: how often systemd began to start it since the mark.
starts() {
    journal --since="$mark" | grep --count "^Starting $unit"
}

sql() {
    psql "$ACKONCE_POSTGRES_URL" --no-psqlrc --quiet --tuples-only --no-align --command "$1"
}

has_applied() {
    [[ $(sql 'SELECT count(*) FROM orders') == "$1" ]]
}

# depth QUEUE: messages in it, ready or out.
depth() {
    "$ACKONCE_RABBITMQCTL" --quiet list_queues name messages | awk -v q="$1" '$1 == q {print $2}'
}

is_empty() {
    [[ $(depth "$1") == 0 ]]
}

# orders FROM TO: publishes so many, by way of the installed program.
orders() {
    seq --format='{"message_id":"order-%g","body":{"customer":"ada","amount_cents":1250}}' "$1" "$2" |
        inside ackonce publish --config /root/config.toml --exchange shop --routing-key order.placed --file - >"$scratch/publish.log" 2>&1 ||
        fail "ackonce publish failed: $(cat "$scratch/publish.log")"
}

# slow ID SECONDS: a message whose handler takes so long.
slow() {
    inside ackonce publish --config /root/config.toml --queue slow --message-id "$1" --body "$2" >"$scratch/publish.log" 2>&1 ||
        fail "ackonce publish failed: $(cat "$scratch/publish.log")"
}

# credential NAME TEXT
credential() {
    printf '%s\n' "$2" | put "$credentials/$1" 600
}

# configure PREFETCH: three URLs, and a consumer for each type of handler.
configure() {
    credential amqp "$ACKONCE_AMQP_URL"
    credential redis "$ACKONCE_REDIS_URL"
    credential postgres "$ACKONCE_POSTGRES_URL"
    [[ -n ${admin_port:-} ]] || admin_port=$(free_port)
    [[ -n $receiver ]] || start_receiver
    put /etc/ackonce/config.toml 640 <<CONFIG
[broker]
url_file = "\${CREDENTIALS_DIRECTORY:-$credentials}/amqp"
[redis]
url_file = "\${CREDENTIALS_DIRECTORY:-$credentials}/redis"
[postgres]
url_file = "\${CREDENTIALS_DIRECTORY:-$credentials}/postgres"
[daemon]
shutdown_timeout = "30s"
[admin]
listen = "127.0.0.1:$admin_port"

[[consumer]]
name = "orders"
prefetch = $1
[[consumer.topology.binding]]
exchange = "shop"
exchange_type = "topic"
routing_key = "order.*"
[consumer.handler]
type = "sql"
file = "/usr/share/ackonce/sql/examples/orders.sql"

[[consumer]]
name = "slow"
workers = 2
[consumer.handler]
type = "command"
argv = ["/bin/sh", "-c", 'read -r seconds; sleep "\$seconds"; echo "\$ACKONCE_MESSAGE_ID" >>/var/lib/ackonce/slow']

[[consumer]]
name = "calls"
[consumer.handler]
type = "http"
url = "http://127.0.0.1:$receiver_port/"
CONFIG
    # For those who publish while the daemon's own is broken.
    inside cp /etc/ackonce/config.toml /root/
    # The rule that also holds after each boot: 0640 root:ackonce.
    inside systemd-tmpfiles --create ackonce.conf
    # In so many words: the user ackonce would make it in the schema ackonce.
    sql 'SET client_min_messages = error; CREATE TABLE IF NOT EXISTS public.orders
         (message_id text, customer text, amount_cents bigint, placed_at timestamptz)'
}

start_receiver() {
    receiver_port=$(free_port)
    python3 "$here/../examples/receivers/receiver.py" "$receiver_port" "$scratch/receiver.db" >"$scratch/receiver.log" 2>&1 &
    receiver=$!
    eventually 20 "the receiver listens" answers "$receiver_port"
}

# quick: watches it more closely than the unit does.
quick() {
    put "$drop_in" <<'DROP_IN'
[Service]
WatchdogSec=5s
TimeoutAbortSec=2s
RestartSec=2s
DROP_IN
    inside systemctl daemon-reload
}

# runs: configured, started and consuming.
runs() {
    if [[ -z ${configured:-} ]]; then
        configure 512
        configured=1
    fi
    is ActiveState active || inside systemctl start "$unit" || fail "it does not start"
    is ActiveState active || fail "it is not active"
}

test_installs() {
    local output
    output=$(inside dpkg --install /packages/ackonce.deb 2>&1) || fail "dpkg: $output"
    printf '%s\n' "$output" | sed 's/^/             dpkg: /'
    same "$(inside dpkg-query --show --showformat='${db:Status-Status}' ackonce)" installed "the package"
    same "$(inside stat --format='%a %U:%G' /etc/ackonce/config.toml)" "640 root:ackonce" "the configuration"
    same "$(inside stat --format='%a %U:%G' "$credentials")" "700 root:root" "the credentials"
    same "$(inside systemctl is-enabled "$unit" || true)" disabled "the service"
    same "$(property ActiveState)" inactive "the service"
    output=$(inside systemd-analyze verify --man=no "$unit" ackonce@x.service 2>&1) || fail "systemd-analyze verify: $output"
    same "$output" "" "systemd-analyze verify"
    inside systemd-analyze security --no-pager --offline=true --threshold=11 "/usr/lib/systemd/system/$unit" \
        >"$scratch/security.log" 2>&1 || fail "the exposure is above 1.1: $(tail -n 1 "$scratch/security.log")"
    ok "disabled and inactive, 0640 root:ackonce; verify is silent; $(tail -n 1 "$scratch/security.log")"
}

test_unconfigured() {
    set_mark
    ! inside systemctl start "$unit" 2>/dev/null || fail "it starts without a consumer"
    same "$(property ActiveState)" failed "the service"
    same "$(property ExecMainStatus)" 78 "the exit status"
    sleep 12
    same "$(starts) $(property NRestarts)" "1 0" "starts and restarts in 12 s"
    has "$(journal --since="$mark")" 'consumer' "what it says"
    inside systemctl reset-failed "$unit"
    ok "as it comes it ends with 78, once, and names what is missing"
}

test_consumes() {
    runs
    same "$(property StatusText)" "3 of 3 consumers consume" "the status"
    is_consuming || fail "/readyz says that it is not ready"
    has "$(inside ackonce status)" 'orders' "ackonce status"
    orders 1 2000
    orders 1 500
    eventually 30 "2000 orders are applied" has_applied 2000
    eventually 30 "the queue is empty" is_empty orders
    same "$(sql 'SELECT count(DISTINCT message_id) FROM orders')" 2000 "different orders"
    slow quick-1 0
    eventually 20 "the program ran" inside grep --quiet --no-messages --line-regexp quick-1 /var/lib/ackonce/slow
    inside ackonce publish --config /root/config.toml --queue calls --message-id call-1 --body "{}" >/dev/null 2>&1
    eventually 20 "the receiver was called" called call-1
    # The journal keeps the priority apart from the text.
    same "$(journal | grep --count '^<[0-9]>' || true)" 0 "lines with a raw priority"
    has "$(inside journalctl --quiet --unit="$unit" --output=json)" '"PRIORITY":"6".*handles messages|handles messages.*"PRIORITY":"6"' "the priority"
    ok "2500 deliveries of 2000 orders applied once each; a program and a receiver called"
}

is_consuming() {
    curl --silent --fail --output /dev/null "127.0.0.1:$admin_port/readyz"
}

called() {
    curl --silent "127.0.0.1:$receiver_port/" | grep --quiet --fixed-strings "calls:$1"
}

test_restricted() {
    runs
    local pid status
    pid=$(property MainPID)
    status=$(inside cat "/proc/$pid/status")
    has "$status" '^NoNewPrivs:[[:space:]]1$' "no new privileges"
    has "$status" '^Seccomp:[[:space:]]2$' "a filter of system calls"
    has "$status" '^CapBnd:[[:space:]]0+$' "no capabilities"
    same "$(inside ps -o user= -p "$pid")" ackonce "its user"
    same "$(inside cat "/proc/$pid/limits" | awk '/^Max core file size/ {print $5, $6}')" "0 0" "core files"
    # By its owner or, where the file system can, by an access list.
    has "$(inside stat --format=%a "/run/credentials/$unit/amqp")" '^4[04]0$' "its copy of a credential"
    ! inside runuser -u ackonce -- cat "$credentials/amqp" 2>/dev/null || fail "the user reads the credentials"
    same "$(inside cat "/proc/$pid/cmdline" "/proc/$pid/environ" | grep --count --text 'amqp://' || true)" 0 "URLs in its environment"
    ok "as ackonce with no capability, no new privileges, a filter of system calls, no core files"
}

# configure_certificates: as docs/install.md has it, for the servers of
# script/lib/tls.sh.
configure_certificates() {
    local name folder="\${CREDENTIALS_DIRECTORY:-$credentials}"
    configure 512
    credential amqp "amqps://guest:guest@127.0.0.1:$amqps_port/%2f"
    credential redis "rediss://127.0.0.1:$rediss_port/0"
    credential postgres "${ACKONCE_POSTGRES_URL/ackonce@/shop@}?sslmode=verify-full"
    for name in ca.pem client.pem client.key; do
        put "$credentials/$name" 600 <"$scratch/tls/${name/client/shop}"
    done
    inside sed --in-place "/^url_file = /a ca_file = \"$folder/ca.pem\"\\n\
client_cert_file = \"$folder/client.pem\"\\nclient_key_file = \"$folder/client.key\"" /etc/ackonce/config.toml
    inside cp /etc/ackonce/config.toml /root/
    put "$certificates_drop_in" <<'DROP_IN'
[Service]
LoadCredential=ca.pem:/etc/ackonce/credentials/ca.pem
LoadCredential=client.pem:/etc/ackonce/credentials/client.pem
LoadCredential=client.key:/etc/ackonce/credentials/client.key
DROP_IN
    inside systemctl daemon-reload
}

test_encrypted() {
    runs
    local amqps_port rediss_port output ports
    amqps_port=$(free_port)
    rediss_port=$(free_port)
    mkdir "$scratch/tls"
    make_authority "$scratch/tls"
    issue "$scratch/tls" server IP:127.0.0.1
    issue "$scratch/tls" shop DNS:worker-1
    secure_rabbitmq "$scratch/tls" "$amqps_port"
    secure_redis "$scratch/tls" "$rediss_port"
    secure_postgres "$scratch/tls" shop
    configure_certificates
    inside sed '/^client_/d' /root/config.toml | put /root/bare.toml
    ! output=$(inside ackonce check --config /root/bare.toml 2>&1) || fail "a server wants no certificate: $output"
    same "$(grep --count '^error' <<<"$output")" 3 "servers that want one: $output"
    output=$(inside ackonce check 2>&1) || fail "ackonce check: $output"

    set_mark
    inside systemctl restart "$unit" || fail "it does not start"
    orders 5001 5500
    eventually 30 "500 more orders are applied" has_applied_like 'order-5___' 500
    # What each server says of who is connected.
    eventually 20 "RabbitMQ has TLS connections alone" rabbitmq_says $'true\ttlsv1.3\tCN=shop'
    same "$(sql "SELECT DISTINCT usename, version, client_dn FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
        WHERE application_name LIKE 'ackonce %'")" 'shop|TLSv1.3|/CN=shop' "PostgreSQL's sessions"
    ports=$(redis client list | grep --invert-match --extended-regexp 'cmd=client(\|list)? ' |
        grep --only-matching 'laddr=[^ ]*' | sort --unique)
    same "$ports" "laddr=127.0.0.1:$rediss_port" "the ports of Redis that are connected to"
    ! said 'Redis cannot be used' || fail "it works without Redis"
    inside systemctl reload "$unit" || fail "reloading failed"
    eventually 20 "it reloads" said 'reloaded: nothing has changed'

    # A file that is missing is found out by systemd, before the daemon starts.
    inside mv "$credentials/client.key" /root/
    ! inside systemctl restart "$unit" 2>/dev/null || fail "it starts without its key"
    eventually 20 "systemd says that it is the credentials" said 'status=243/CREDENTIALS'
    inside mv /root/client.key "$credentials/"
    eventually 30 "it starts when the key is there" is ActiveState active

    inside rm "$certificates_drop_in" /root/bare.toml
    inside systemctl daemon-reload
    configure 512
    inside systemctl restart "$unit" || fail "it does not start without TLS"
    ok "500 orders over TLS 1.3 with a certificate that all three servers demand, its key a credential of the unit"
}

# rabbitmq_says LINE: whether that is what each connection is.
rabbitmq_says() {
    [[ $("$ACKONCE_RABBITMQCTL" --silent list_connections ssl ssl_protocol peer_cert_subject | sort --unique) == "$1" ]]
}

# has_applied_like PATTERN COUNT
has_applied_like() {
    [[ $(sql "SELECT count(DISTINCT message_id) || '/' || count(*) FROM orders WHERE message_id LIKE '$1'") == "$2/$2" ]]
}

test_reloads() {
    runs
    local pid
    pid=$(property MainPID)
    set_mark
    configure 256
    inside systemctl reload "$unit" || fail "reloading failed"
    eventually 20 "it tells what changed" said 'reloaded: .*prefetch'
    eventually 30 "it consumes again" is_consuming
    eventually 20 "the status is the usual one" is StatusText "3 of 3 consumers consume"
    same "$(property MainPID)" "$pid" "the process"
    orders 3001 3100
    eventually 30 "100 more orders are applied" has_applied_up_to order-3100
    set_mark
    inside sed --in-place 's/^prefetch = .*/prefetch = 0/' /etc/ackonce/config.toml
    ! inside systemctl reload "$unit" 2>/dev/null || fail "a broken configuration is not refused"
    eventually 20 "the journal has the reason" said 'prefetch'
    ! said 'told to reload' || fail "the daemon was told all the same"
    inside systemctl kill --kill-who=main --signal=HUP "$unit"
    eventually 20 "the daemon refuses it" said 'reload refused.*prefetch'
    eventually 20 "the status keeps it in mind" is StatusText \
        "3 of 3 consumers consume; the last reload was refused, see the log"
    same "$(property MainPID) $(property ActiveState)" "$pid active" "the process"
    orders 3101 3200
    eventually 30 "100 more orders are applied" has_applied_up_to order-3200
    configure 512
    inside systemctl reload "$unit" || fail "reloading what is mended failed"
    eventually 20 "the refusal is forgotten" is StatusText "3 of 3 consumers consume"
    ok "changed without a new process; a broken configuration refused, twice, and work went on"
}

has_applied_up_to() {
    [[ $(sql "SELECT count(*) FROM orders WHERE message_id = '$1'") == 1 ]]
}

program_runs() {
    inside pgrep --exact --uid ackonce sleep >/dev/null
}

test_drains() {
    runs
    quick
    inside systemctl restart "$unit"
    slow drained 9
    eventually 20 "the program runs" program_runs
    local began=$SECONDS
    set_mark
    inside systemctl stop "$unit" || fail "stopping failed"
    same "$(property Result) $(property ExecMainStatus)" "success 0" "the result"
    same "$(inside grep --count --line-regexp drained /var/lib/ackonce/slow)" 1 "runs of the message"
    ! said 'Watchdog timeout' || fail "the watchdog bit while it drained"
    eventually 20 "the queue is empty" is_empty slow
    same "$(starts)" 0 "starts"
    ok "stopped in $((SECONDS - began)) s, after the program that had 9 s to run; WatchdogSec=5s did not bite"
}

test_watched() {
    runs
    quick
    inside systemctl restart "$unit"
    local pid restarts
    pid=$(property MainPID)
    restarts=$(property NRestarts)
    set_mark
    sleep 8
    same "$(property MainPID)" "$pid" "the process, after 8 s of idleness"
    inside kill -STOP "$pid"
    eventually 30 "the watchdog bites" said 'Watchdog timeout'
    eventually 30 "it runs again" is NRestarts $((restarts + 1))
    eventually 30 "it consumes again" is StatusText "3 of 3 consumers consume"
    [[ $(property MainPID) != "$pid" ]] || fail "it is the same process"
    orders 2001 2100
    eventually 30 "100 more orders are applied" has_applied_up_to order-2100
    eventually 30 "the queue is empty" is_empty orders
    ok "left alone while idle; stopped by SIGSTOP, it was killed and started again once"
}

test_killed() {
    runs
    quick
    inside systemctl restart "$unit"
    local pid program before
    slow killed 60
    eventually 20 "the program runs" program_runs
    program=$(inside pgrep --exact --uid ackonce sleep)
    pid=$(property MainPID)
    before=$(property NRestarts)
    inside kill -KILL "$pid"
    eventually 30 "it is started again" is NRestarts $((before + 1))
    eventually 30 "it is active" is ActiveState active
    ! inside kill -0 "$program" 2>/dev/null || fail "its program runs on"
    # The message has come again.
    eventually 60 "the program runs again" inside pkill --exact --uid ackonce sleep
    ok "SIGKILL took its program along, and it was started again after RestartSec"
}

test_refuses() {
    runs
    set_mark
    inside sed --in-place 's/^prefetch = .*/prefetch = 0/' /etc/ackonce/config.toml
    ! inside systemctl restart "$unit" 2>/dev/null || fail "it starts with prefetch = 0"
    sleep 12
    same "$(property ActiveState) $(property ExecMainStatus)" "failed 78" "the service"
    same "$(starts)" 1 "starts in 12 s"
    configure 512
    inside systemctl reset-failed "$unit"
    ok "a broken configuration: one start in 12 s, exit status 78"
}

test_waits() {
    runs
    inside systemctl stop "$unit"
    put "$drop_in" <<'DROP_IN'
[Service]
TimeoutStartSec=4s
DROP_IN
    inside systemctl daemon-reload
    local server
    for server in amqp postgres; do
        configure 512
        credential "$server" "$server://nobody@127.0.0.1:1/x"
        set_mark
        inside systemctl start --no-block "$unit"
        sleep 10
        same "$(property ActiveState) $(starts)" "activating 1" "10 s without $server, with TimeoutStartSec=4s"
        has "$(property StatusText)" '.' "the status without $server"
        inside systemctl stop "$unit"
        same "$(property Result)" success "stopping it then"
    done
    configure 512
    inside rm "$drop_in"
    inside systemctl daemon-reload
    ok "it waits for RabbitMQ and for PostgreSQL beyond TimeoutStartSec, as it asks for the time"
}

test_instances() {
    runs
    inside mkdir --mode=700 "$credentials/second"
    inside cp --preserve=mode "$credentials/amqp" "$credentials/redis" "$credentials/postgres" "$credentials/second/"
    put /etc/ackonce/second.toml <<CONFIG
[broker]
url_file = "\${CREDENTIALS_DIRECTORY}/amqp"
[redis]
url_file = "\${CREDENTIALS_DIRECTORY}/redis"
[postgres]
url_file = "\${CREDENTIALS_DIRECTORY}/postgres"
[admin]
listen = "127.0.0.1:$(free_port)"
[[consumer]]
name = "second"
[consumer.handler]
type = "command"
argv = ["/usr/bin/tee", "/var/lib/ackonce/second/got"]
CONFIG
    inside systemd-tmpfiles --create ackonce.conf
    same "$(inside stat --format='%a %U:%G' /etc/ackonce/second.toml)" "640 root:ackonce" "its configuration"
    inside systemctl start ackonce@second.service || fail "the instance does not start"
    inside ackonce publish --config /root/config.toml --queue second --message-id one --body two >/dev/null 2>&1
    eventually 20 "the instance works" inside grep --quiet --no-messages two /var/lib/ackonce/second/got
    same "$(property ActiveState) $(property ActiveState ackonce@second.service)" "active active" "both"
    ok "ackonce@second has its own configuration, credentials and folder beside ackonce"
}

# repack VERSION: the package again, with another version and another
# configuration file.
repack() {
    local folder=$scratch/repack
    rm -rf "$folder"
    dpkg-deb --raw-extract "$scratch/packages/ackonce.deb" "$folder"
    sed --in-place "s/^Version: .*/Version: $1/" "$folder/DEBIAN/control"
    printf '\n# A line of version %s.\n' "$1" >>"$folder/etc/ackonce/config.toml"
    (cd "$folder" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | xargs --null md5sum >DEBIAN/md5sums)
    dpkg-deb --root-owner-group --build "$folder" "$scratch/packages/$1.deb" >/dev/null
}

test_upgrades() {
    runs
    local pid edited
    pid=$(property MainPID)
    edited=$(inside md5sum /etc/ackonce/config.toml)
    repack 99.0-1
    inside dpkg --force-confdef --force-confold --install /packages/99.0-1.deb >"$scratch/upgrade.log" 2>&1 ||
        fail "dpkg: $(cat "$scratch/upgrade.log")"
    same "$(inside md5sum /etc/ackonce/config.toml)" "$edited" "the edited configuration"
    inside test -e /etc/ackonce/config.toml.dpkg-dist || fail "the new configuration is not beside it"
    same "$(inside stat --format='%a %U:%G' /etc/ackonce/config.toml)" "640 root:ackonce" "its owner"
    eventually 30 "the new program runs" pid_is_not "$pid"
    eventually 30 "it is active" is ActiveState active
    same "$(inside dpkg-query --show --showformat='${Version}' ackonce)" 99.0-1 "the version"
    ok "an upgrade keeps the edited configuration and starts again what ran"
}

pid_is_not() {
    ! is MainPID "$1" && ! is MainPID 0
}

test_goes() {
    runs
    inside systemctl enable --quiet "$unit"
    inside dpkg --remove ackonce >"$scratch/remove.log" 2>&1 || fail "dpkg: $(cat "$scratch/remove.log")"
    same "$(inside pgrep --count --uid ackonce || true)" 0 "processes after the removal"
    inside test -e /etc/ackonce/config.toml || fail "the removal took the configuration"
    inside dpkg --purge ackonce >"$scratch/purge.log" 2>&1 || fail "dpkg: $(cat "$scratch/purge.log")"
    same "$(inside sh -c 'ls -d /var/lib/ackonce /etc/ackonce/credentials /etc/ackonce/config.toml \
        /usr/share/ackonce /usr/share/doc/ackonce /usr/bin/ackonce \
        /etc/systemd/system/multi-user.target.wants/ackonce.service 2>/dev/null' || true)" "" "what is left"
    same "$(inside dpkg-query --show ackonce 2>/dev/null || true)" "" "what dpkg knows"
    inside dpkg --install /packages/ackonce.deb >/dev/null 2>&1 || fail "it cannot be installed again"
    ok "removed with its configuration kept, purged without a trace, installed again"
}
