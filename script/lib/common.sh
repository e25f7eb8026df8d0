# shellcheck shell=bash
# What the scripts share: talking to the user, and telling whether a process
# is the one that was started. Sourced, never run; starts and ends nothing.

if ((BASH_VERSINFO[0] < 4)); then
    printf '%s: bash 4 or newer is needed, this is %s\n' "$0" "$BASH_VERSION" >&2
    exit 1
fi

# Server logs and tool output are read by these scripts, so they speak C.
export LC_ALL=C

say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

die() {
    say "$*"
    exit 1
}

# join_with SEPARATOR WORD...: the words in one line.
join_with() {
    local separator=$1 line=${2:-} word
    for word in "${@:3}"; do
        line+=$separator$word
    done
    printf '%s\n' "$line"
}

# have PROGRAM: whether it can be run. Debian keeps servers in sbin, which is
# not on every user's PATH.
have() {
    PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1
}

# first_of PROGRAM...: the path of the first one that is there.
first_of() {
    local program
    for program in "$@"; do
        if PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$program"; then
            return 0
        fi
    done
    return 1
}

# start_of PID: when a process started, in a form that two processes with the
# same pid never share. Fails when there is no such process or it is a zombie.
start_of() {
    local stat fields
    if [[ -r /proc/$1/stat ]]; then
        stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
        # The program's name stands in brackets and may hold spaces.
        read -r -a fields <<<"${stat##*) }"
        [[ ${fields[0]:-Z} != Z ]] || return 1
        printf '%s\n' "${fields[19]}"
    else
        [[ ! -d /proc/self ]] || return 1
        stat=$(ps -o stat=,lstart= -p "$1" 2>/dev/null) || return 1
        [[ $stat != Z* ]] || return 1
        printf '%s\n' "${stat#* }" | tr -s ' ' '-'
    fi
}

# answers PORT: whether something listens there on 127.0.0.1.
answers() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# free_port: a loopback port nobody listens on, below the range from which
# most systems hand out ports to clients. It is a proposal: the server that
# binds it is the judge, and its caller tries another one when it lost.
free_port() {
    local port
    for _ in {1..200}; do
        port=$((15000 + RANDOM % 17000))
        if ! answers "$port"; then
            printf '%s\n' "$port"
            return 0
        fi
    done
    die "failed to find a free port between 15000 and 31999 on 127.0.0.1"
}

# end_chaos FOLDER: ends what a chaos run has left behind, if it has. `here` is
# the folder of the script that sources this one.
# shellcheck disable=SC2154
end_chaos() {
    [[ -d $1 ]] || return 0
    umount -l "$1/disk" 2>/dev/null || true
    rmdir "$1/disk" 2>/dev/null || true
    ACKONCE_SERVICES_DIR=$1 "$here/services" down || say "failed to end the servers in $1"
    rm -f "$1.log"
}

# quoted WORD...: the words as a shell reads them back.
quoted() {
    (($# == 0)) || printf '%q ' "$@"
}
