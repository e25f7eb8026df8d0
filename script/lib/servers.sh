# shellcheck shell=bash
# The private servers: where their programs are, how each is started, asked
# whether it answers, and ended. Sourced by script/services, which holds the
# commands. Expects the functions of common.sh and the variables
#   services_dir   the folder of this set of servers
#   state          the file that says what was started
#   timeout_s      seconds a server is given to answer, and to end
#   rabbitmq_root  a chroot to run RabbitMQ from, or empty
#   in_memory      1 when PostgreSQL's files shall be in memory
# shellcheck disable=SC2154

# The state file holds lines `kind name value`; the last one of a kind and name
# counts. Kinds: process (pid and start), port, home (a folder that is removed
# by `down`), root (the chroot), nodes (how many of RabbitMQ), cookie (by which
# they know one another).
#
# The nodes of a RabbitMQ cluster are servers called rabbitmq, rabbitmq2,
# rabbitmq3, with ports amqp, amqp2, amqp3 and so on.
remember() {
    printf '%s\n' "$*" >>"$state"
}

# recall KIND NAME: the value remembered last, or nothing.
recall() {
    [[ ! -f $state ]] || sed -n "s|^$1 $2 ||p" "$state" | tail -n 1
}

# runs NAME: whether the process that was started under this name still runs.
# A pid alone may meanwhile be another's.
runs() {
    local pid start
    read -r pid start <<<"$(recall process "$1")"
    [[ -n $pid && $(start_of "$pid") == "$start" ]]
}

pid_of() {
    local pid _
    read -r pid _ <<<"$(recall process "$1")"
    printf '%s\n' "$pid"
}

# launch NAME LOG COMMAND...: starts a server in a session of its own, so that
# Ctrl-C in this terminal does not reach it. The process writes itself into the
# state file before it becomes the server: no moment in which it runs unknown.
launch() {
    local name=$1 log=$2 pid session=()
    shift 2
    if have setsid; then
        session=(setsid)
    fi
    (
        trap '' HUP
        exec 9>&- </dev/null >>"$log" 2>&1
        # From here on only `exec`, which keeps the pid and the start time.
        pid=$BASHPID
        remember process "$name" "$pid" "$(start_of "$pid")"
        exec "${session[@]}" "$@"
    ) &
    while kill -0 $! 2>/dev/null && [[ $(pid_of "$name") != "$!" ]]; do
        sleep 0.02
    done
}

# choose_port NAME: the port it had before, if it is free, or another.
choose_port() {
    local port
    port=$(recall port "$1")
    if [[ -z $port ]] || answers "$port"; then
        port=$(free_port)
        while grep -q "^port .* $port\$" "$state"; do
            port=$(free_port)
        done
        remember port "$1" "$port"
    fi
    printf '%s\n' "$port"
}

# home_of NAME [PARENT]: the private folder of a server, made if need be: in
# the services folder, or with a name of its own under PARENT.
home_of() {
    local home
    home=$(recall home "$1")
    if [[ -z $home ]]; then
        home=$services_dir/$1
        if [[ -n ${2:-} ]]; then
            home=$(mktemp -d "$2/ackonce-$1.XXXXXX")
        fi
        remember home "$1" "$home"
    fi
    mkdir -p "$home"
    chmod 700 "$home"
    printf '%s\n' "$home"
}

# leftovers HOME: processes that work in a server's private folder: children
# that outlive it for a moment when it is killed.
leftovers() {
    local cwd
    for cwd in /proc/[0-9]*/cwd; do
        case $(readlink "$cwd" 2>/dev/null) in
            "$1" | "$1"/*) cwd=${cwd#/proc/} && echo "${cwd%/cwd}" ;;
        esac
    done
}

# await_quiet HOME: waits until nothing works in it any more.
await_quiet() {
    local pids deadline=$((SECONDS + 20))
    while pids=$(leftovers "$1") && [[ -n $pids ]]; do
        ((SECONDS < deadline)) || die "processes ${pids//$'\n'/, } still work in $1"
        sleep 0.05
    done
}

# redis_program server|cli: Redis, or Valkey where that took its place.
redis_program() {
    first_of "redis-$1" "valkey-$1"
}

start_redis() {
    local home port
    home=$(home_of redis)
    port=$(choose_port redis)
    launch redis "$home/log" "$(redis_program server)" \
        --port "$port" --bind 127.0.0.1 --dir "$home" --daemonize no \
        --save "" --appendonly no --maxmemory-policy noeviction
}

redis_answers() {
    [[ $("$(redis_program cli)" -h 127.0.0.1 -p "$(recall port redis)" info server 2>/dev/null) \
        == *process_id:"$(pid_of redis)"* ]]
}

# postgres_bin: the folder of the newest server that is installed.
postgres_bin() {
    local folder
    for folder in $(printf '%s\n' /usr/lib/postgresql/*/bin /usr/pgsql-*/bin \
        /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin | sort -rV); do
        if [[ -x $folder/initdb && -x $folder/postgres ]]; then
            printf '%s\n' "$folder"
            return 0
        fi
    done
    folder=$(first_of initdb) && dirname "$folder"
}

# PostgreSQL refuses to run as root, so it runs as the user its package made.
as_postgres=()
if ((EUID == 0)); then
    as_postgres=(setpriv --reuid=postgres --regid=postgres --init-groups --)
fi

# has_memory: whether there is room in memory for what all tests write: they
# need 1.5 GB at the most, most of it write-ahead log.
has_memory() {
    local free available
    [[ $(stat -f -c %T /dev/shm 2>/dev/null) == tmpfs ]] || return 1
    free=$(df -k --output=avail /dev/shm | tail -n 1)
    available=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB$/\1/p' /proc/meminfo)
    ((free > 4000000 && ${available:-0} > 6000000))
}

# postgres_parent: nothing, or where its folder has to be made instead: in
# memory; or when its user cannot reach the services folder (a checkout under
# /root), or when the path is too long for the socket in it.
postgres_parent() {
    if ((in_memory)) && has_memory; then
        echo /dev/shm
    elif ((${#services_dir} > 75)) || ! "${as_postgres[@]}" test -x "$services_dir"; then
        echo /var/tmp
    fi
}

start_postgres() {
    local home port bin
    bin=$(postgres_bin)
    home=$(home_of postgres "$(postgres_parent)")
    ((EUID != 0)) || chown postgres:postgres "$home"
    port=$(choose_port postgres)
    if [[ ! -f $home/initialised ]]; then
        rm -rf "$home/data"
        # --no-sync spares the syncing of an empty database only. What tests
        # commit is synced: fsync and synchronous_commit keep their defaults.
        (cd "$home" && "${as_postgres[@]}" "$bin/initdb" --no-sync --username=ackonce \
            --auth=trust --encoding=UTF8 --locale=C --pgdata="$home/data") >>"$home/log" 2>&1 ||
            fail_with_log postgres
        touch "$home/initialised"
    fi
    # A server that was killed leaves its locks behind, with a pid that may be a
    # zombie's or another's. Its children are what must not be there any more.
    await_quiet "$home/data"
    rm -f "$home/data/postmaster.pid" "$home"/.s.PGSQL.*
    cat >"$home/data/postgresql.auto.conf" <<END
listen_addresses = '127.0.0.1'
port = $port
unix_socket_directories = '$home'
max_connections = 400
shared_buffers = '128MB'
timezone = 'UTC'
log_line_prefix = '%m [%p] %q%u@%d '
END
    launch postgres "$home/log" "${as_postgres[@]}" "$bin/postgres" -D "$home/data"
}

postgres_answers() {
    local home port psql
    home=$(recall home postgres)
    port=$(recall port postgres)
    # Through the socket in the private folder: no other server can answer.
    psql=(psql -X -q -A -t -U ackonce -h "$home" -p "$port")
    [[ $("${psql[@]}" -d postgres -c 'select 1' 2>/dev/null) == 1 ]] || return 1
    if [[ $("${psql[@]}" -d postgres -c "select 1 from pg_database where datname = 'ackonce'") != 1 ]]; then
        "${psql[@]}" -d postgres -c 'create database ackonce' || return 1
    fi
    answers "$port"
}

# rabbitmq_bin: the folder of its own scripts. The wrapper that Debian puts on
# the PATH insists on root or the user rabbitmq.
rabbitmq_bin() {
    local folder
    for folder in "$rabbitmq_root"/usr/lib/rabbitmq/bin \
        "$rabbitmq_root"/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin \
        "$rabbitmq_root"/opt/homebrew/opt/rabbitmq/sbin "$rabbitmq_root"/usr/local/opt/rabbitmq/sbin; do
        if [[ -x $folder/rabbitmq-server && -x $folder/rabbitmqctl ]]; then
            printf '%s\n' "${folder#"$rabbitmq_root"}"
            return 0
        fi
    done
    [[ -z $rabbitmq_root ]] && folder=$(first_of rabbitmq-server) && dirname "$folder"
}

# rabbitmq_memory_bytes: when the node raises its memory alarm. Four tenths of
# the memory, as is its default, but said outright: several nodes share the
# machine, and one in a chroot without /proc cannot find out.
rabbitmq_memory_bytes() {
    local bytes=2000000000 kib
    if kib=$(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo 2>/dev/null) && [[ -n $kib ]]; then
        bytes=$((kib * 1024 * 4 / 10))
    fi
    printf '%s\n' $((bytes > 4000000000 ? 4000000000 : bytes))
}

# node_suffixes: what stands behind the names of each node's server and ports.
node_suffixes() {
    local nodes number
    nodes=$(recall nodes rabbitmq)
    echo ''
    for ((number = 2; number <= ${nodes:-1}; number++)); do
        echo "$number"
    done
}

# write_cluster_config HOME: by which the nodes find one another when they start
# for the first time. Nothing where there is one alone.
write_cluster_config() {
    local suffix number=0
    [[ -n $(recall cookie rabbitmq) ]] || return 0
    (umask 377 && recall cookie rabbitmq >"$1/.erlang.cookie")
    echo 'cluster_formation.peer_discovery_backend = classic_config'
    while read -r suffix; do
        number=$((number + 1))
        echo "cluster_formation.classic_config.nodes.$number = ackonce-$(recall port "amqp$suffix")@localhost"
    done < <(node_suffixes)
}

# write_rabbitmq_config HOME INNER_HOME SUFFIX: the node's files, and
# `rabbitmqctl` beside the state file, which speaks to this node alone.
# INNER_HOME is HOME as seen from inside the chroot.
write_rabbitmq_config() {
    local home=$1 inner=$2 suffix=$3 environment
    mkdir -p "$home/conf.d"
    : >"$home/env.conf"
    printf '[rabbitmq_management].\n' >"$home/enabled_plugins"
    cat >"$home/rabbitmq.conf" <<END
listeners.tcp.1 = 127.0.0.1:$(recall port "amqp$suffix")
management.tcp.ip = 127.0.0.1
management.tcp.port = $(recall port "management$suffix")
collect_statistics_interval = 1000
disk_free_limit.absolute = 50MB
vm_memory_high_watermark.absolute = $(rabbitmq_memory_bytes)
max_message_size = 134217728
log.console = false
log.file = log
END
    [[ -f $home/.erlang.cookie ]] || write_cluster_config "$home" >>"$home/rabbitmq.conf"
    # By default it reads /proc, which a chroot need not have.
    [[ -z $rabbitmq_root ]] || echo 'vm_memory_calculation_strategy = allocated' >>"$home/rabbitmq.conf"
    # `env -i`: nothing that this shell happens to hold, a RABBITMQ_ variable
    # least of all, changes the node. `detached` makes the script become the
    # server rather than wait for it as its parent.
    environment=(env -i "PATH=$PATH:/usr/sbin:/sbin" LANG=C.UTF-8 "HOME=$inner" detached=true
        ERL_EPMD_ADDRESS=127.0.0.1 "ERL_EPMD_PORT=$(recall port epmd)"
        "RABBITMQ_NODENAME=ackonce-$(recall port "amqp$suffix")@localhost"
        RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 "RABBITMQ_NODE_PORT=$(recall port "amqp$suffix")"
        "RABBITMQ_DIST_PORT=$(recall port "dist$suffix")"
        RABBITMQ_CTL_DIST_PORT_MIN=32000 RABBITMQ_CTL_DIST_PORT_MAX=32700
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}"
        "RABBITMQ_CTL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}"
        "RABBITMQ_MNESIA_BASE=$inner/data" "RABBITMQ_LOG_BASE=$inner"
        "RABBITMQ_PID_FILE=$inner/pid" "RABBITMQ_ENABLED_PLUGINS_FILE=$inner/enabled_plugins"
        "RABBITMQ_CONFIG_FILE=$inner/rabbitmq.conf" "RABBITMQ_CONFIG_FILES=$inner/conf.d"
        "RABBITMQ_ADVANCED_CONFIG_FILE=$inner/advanced.config"
        "RABBITMQ_CONF_ENV_FILE=$inner/env.conf"
        "RABBITMQ_GENERATED_CONFIG_DIR=$inner" "RABBITMQ_SCHEMA_DIR=$inner/schema")
    # One text under two names: it runs the program that it is called like.
    cat >"$services_dir/rabbitmqctl$suffix" <<END
#!/usr/bin/env bash
exec $(quoted "${in_chroot[@]}")sh -c 'cd "\$1" && shift && exec "\$@"' sh $(quoted "$inner" "${environment[@]}")\
    $(printf %q "$(rabbitmq_bin)")/"\$(basename "\$0" $(printf %q "$suffix"))" "\$@"
END
    chmod 755 "$services_dir/rabbitmqctl$suffix"
    cp "$services_dir/rabbitmqctl$suffix" "$home/rabbitmq-server"
}

# An epmd of its own, so that it can be ended with the node: the node would
# start the machine's otherwise, and nobody knows when that may end.
start_epmd() {
    local home
    home=$(home_of epmd)
    launch epmd "$home/log" "${in_chroot[@]}" epmd -address 127.0.0.1 -port "$(choose_port epmd)"
}

epmd_answers() {
    answers "$(recall port epmd)"
}

# plan_cluster NODES: ports and cookie, before the first node starts: each is
# told of all.
plan_cluster() {
    local suffix name
    remember nodes rabbitmq "$1"
    [[ -n $(recall cookie rabbitmq) ]] ||
        remember cookie rabbitmq "$(od -An -N20 -tx1 /dev/urandom | tr -d ' \n')"
    while read -r suffix; do
        for name in amqp dist management; do
            [[ -n $(recall port "$name$suffix") ]] || choose_port "$name$suffix" >/dev/null
        done
    done < <(node_suffixes)
}

start_rabbitmq() { start_node ''; }
start_rabbitmq2() { start_node 2; }
start_rabbitmq3() { start_node 3; }
rabbitmq_answers() { node_answers ''; }
rabbitmq2_answers() { node_answers 2; }
rabbitmq3_answers() { node_answers 3; }

start_node() {
    local suffix=$1 home inner name
    if [[ -n $rabbitmq_root ]]; then
        home=$(home_of "rabbitmq$suffix" "$rabbitmq_root/var/tmp")
    else
        home=$(home_of "rabbitmq$suffix")
    fi
    inner=${home#"$rabbitmq_root"}
    for name in amqp dist management; do
        choose_port "$name$suffix" >/dev/null
    done
    # Its children outlive a node that was killed for a moment.
    await_quiet "$home"
    write_rabbitmq_config "$home" "$inner" "$suffix"
    launch "rabbitmq$suffix" "$home/output" "$home/rabbitmq-server"
}

node_answers() {
    local suffix=$1 greeting
    runs epmd || return 1
    # The management plugin says whose node it is; a broker that takes AMQP
    # greets with a frame of type 1.
    [[ $(curl -fsS -m 5 -u guest:guest "http://127.0.0.1:$(recall port "management$suffix")/api/overview" 2>/dev/null) \
        == *"\"node\":\"ackonce-$(recall port "amqp$suffix")@localhost\""* ]] || return 1
    greeting=$( (exec 3<>"/dev/tcp/127.0.0.1/$(recall port "amqp$suffix")" &&
        printf 'AMQP\0\0\x09\x01' >&3 && LC_ALL=C IFS= read -r -t 5 -n 1 -u 3 byte &&
        printf '%d' "'$byte") 2>/dev/null) && [[ $greeting == 1 ]]
}
