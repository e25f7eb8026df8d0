# shellcheck shell=bash
# A Debian booted in a container, with systemd as its first process. It shares
# the network of the host and nothing else, and forgets everything when it ends.
# Sourced by script/systemd-test, whose `say` and `die` it uses.

container_base=
container_pid=
container_init=
container_log=

# make_base SUITE FOLDER: a small Debian with systemd, made once.
make_base() {
    [[ ! -e $2/usr/bin/systemctl ]] || return 0
    mkdir -p "$(dirname "$2")"
    rm -rf "$2.unfinished"
    say "making a Debian $1 in $2 (once, a minute or two)"
    # procps has /bin/kill; the rest comes with systemd.
    debootstrap --variant=minbase --include=systemd-sysv,procps,ca-certificates "$1" "$2.unfinished" >"$2.log" 2>&1 ||
        die "failed to make a Debian $1 with debootstrap: see $2.log"
    rm -f "$2.log"
    mv "$2.unfinished" "$2"
}

# boot BASE PACKAGES LOG: boots it, with the folder PACKAGES at /packages.
boot() {
    container_base=$1
    container_log=$3
    # Nobody registers it: the host may have no systemd of its own.
    systemd-nspawn --quiet --register=no --keep-unit --boot --volatile=overlay \
        --directory="$container_base" --machine="ackonce-test-$$" --bind-ro="$2:/packages" \
        --resolv-conf=off --timezone=off --link-journal=no --console=read-only \
        </dev/null >"$container_log" 2>&1 &
    container_pid=$!
    eventually 60 "the container boots: see $container_log" has_booted
}

has_booted() {
    kill -0 "$container_pid" 2>/dev/null || die "the container ended: see $container_log"
    container_init=$(first_process)
    [[ -n $container_init ]] || return 1
    # `degraded` is what a container is where some unit of the base cannot work.
    [[ $(inside systemctl is-system-running 2>/dev/null) == @(running|degraded) ]]
}

# first_process: the pid, on the host, of the first process in the container.
first_process() {
    local child children=()
    read -r -a children < <(cat "/proc/$container_pid/task/$container_pid/children" 2>/dev/null)
    for child in "${children[@]}"; do
        if [[ $(awk '$1 == "NSpid:" {print $NF}' "/proc/$child/status" 2>/dev/null) == 1 ]]; then
            printf '%s\n' "$child"
            return 0
        fi
    done
}

# inside COMMAND...: runs it as root in the container.
inside() {
    nsenter --target "$container_init" --mount --uts --ipc --pid --root --wd -- \
        /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
        SYSTEMD_PAGER= SYSTEMD_COLORS=0 DEBIAN_FRONTEND=noninteractive "$@"
}

# put FILE [MODE]: writes standard input to a file in the container.
put() {
    # shellcheck disable=SC2016 # for the shell inside
    inside sh -c 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"' sh "$1" "${2:-644}"
}

# halt: ends the container, and everything in it.
halt() {
    [[ -n $container_pid ]] || return 0
    local pid=$container_pid
    container_pid=
    # TERM has nspawn tell the first process to power off.
    kill -TERM "$pid" 2>/dev/null || true
    if ! eventually_quietly 30 has_ended "$pid"; then
        kill -KILL "$container_init" "$pid" 2>/dev/null || true
    fi
    wait "$pid" 2>/dev/null || true
}

has_ended() {
    ! kill -0 "$1" 2>/dev/null
}

# eventually SECONDS WHAT COMMAND...: until the command succeeds, or the test has
# failed.
eventually() {
    local seconds=$1 what=$2
    shift 2
    eventually_quietly "$seconds" "$@" || fail "within $seconds s: $what"
}

eventually_quietly() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.2
    done
}
