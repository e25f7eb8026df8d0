# shellcheck shell=bash
# What has to be on the machine before servers, builds and tests can run, and
# how it gets there. Sourced by script/services; starts no server.

readonly NEXTEST_VERSION=0.9.143

# have_compiled_c: whether a C program can be built; the crate `ring` has some.
have_compiled_c() {
    have cc && printf '#include <stdlib.h>\nint main(void) { return 0; }\n' |
        cc -x c -o /dev/null - >/dev/null 2>&1
}

# python_with MODULE: a Python that has it.
python_with() {
    local python
    for python in python3 /usr/bin/python3; do
        if have "$python" && "$python" -c "import $1" >/dev/null 2>&1; then
            command -v "$python"
            return 0
        fi
    done
    return 1
}

# missing_packages PURPOSE...: the Debian packages still to be installed, one
# a line. A purpose is servers, build, tests, bench, chroot,
# container, package or lint.
missing_packages() {
    local purpose
    for purpose in "$@"; do
        case $purpose in
            servers)
                if [[ -z ${rabbitmq_root:-} ]]; then
                    rabbitmq_bin >/dev/null || echo rabbitmq-server
                fi
                { redis_program server && redis_program cli; } >/dev/null || echo redis-server
                { postgres_bin && first_of psql; } >/dev/null || echo postgresql
                have curl || echo curl
                ;;
            build)
                have_compiled_c || printf '%s\n' gcc libc6-dev
                ;;
            tests)
                python_with pika >/dev/null || echo python3-pika
                # Reads the YAML of ops/.
                python_with yaml >/dev/null || echo python3-yaml
                # Brings promtool along.
                { have prometheus && have promtool; } || echo prometheus
                have shellcheck || echo shellcheck
                # For daemons whose clock is off.
                have faketime || echo faketime
                ;;
            bench)
                have wrk || echo wrk
                ;;
            chroot)
                have debootstrap || echo debootstrap
                ;;
            container)
                have debootstrap || echo debootstrap
                have systemd-nspawn || echo systemd-container
                have nsenter || echo util-linux
                have openssl || echo openssl
                ;;
            package)
                have dpkg-shlibdeps || echo dpkg-dev
                have strip || echo binutils
                have python3 || echo python3
                ;;
            lint)
                have lintian || echo lintian
                ;;
        esac
    done
}

# have_nextest: cargo finds it in its own folder even where that is not on PATH.
have_nextest() {
    cargo nextest --version >/dev/null 2>&1
}

# install_nextest: the test runner. It runs each test in a process of its own,
# which tests that look at their own process count on.
install_nextest() {
    have_nextest && return 0
    say "building the test runner, cargo-nextest $NEXTEST_VERSION: this takes minutes, once"
    cargo install --quiet --locked --version "$NEXTEST_VERSION" \
        --no-default-features --features default-no-update cargo-nextest ||
        die "failed to install the test runner: cargo install --locked cargo-nextest"
}

# apt_install PACKAGE...: runs as root, in a shell of its own, one at a time.
# Packages with a daemon start it when installed; a policy that says no keeps
# ports 5672, 6379 and 5432 as they were. A policy that is there already is the
# administrator's and stays. Units that are new are also not left to start at
# the next boot; units that were there before are not touched.
apt_install() {
    set -euo pipefail
    local policy=/usr/sbin/policy-rc.d unit units=()
    exec 8>/run/ackonce-install.lock
    flock 8
    for unit in rabbitmq-server redis-server postgresql epmd prometheus; do
        if [[ ! -e /lib/systemd/system/$unit.service && ! -e /etc/init.d/$unit ]]; then
            units+=("$unit.service")
            [[ $unit != epmd ]] || units+=(epmd.socket)
        fi
    done
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\n# Written by script/services while it installs packages.\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        # shellcheck disable=SC2064 # the path is meant as it is now
        trap "rm -f '$policy'" EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    local apt=(apt-get -y -q -o DPkg::Lock::Timeout=300 install --no-install-recommends --no-upgrade)
    if ! apt-cache show "$@" >/dev/null 2>&1 || ! "${apt[@]}" "$@" </dev/null; then
        apt-get -q -o DPkg::Lock::Timeout=300 update </dev/null
        "${apt[@]}" "$@" </dev/null
    fi
    if [[ ${#units[@]} -gt 0 ]] && command -v systemctl >/dev/null; then
        for unit in "${units[@]}"; do
            systemctl --quiet disable "$unit" >/dev/null 2>&1 || true
        done
    fi
}

# explain_packages: what to install where there is no apt-get.
explain_packages() {
    cat >&2 <<'END'
Install these yourself; only Debian and Ubuntu are done for you:
            servers                                   building     tests
  Fedora    rabbitmq-server valkey postgresql-server  gcc          python3-pika ShellCheck
            postgresql curl                                        python3-pyyaml prometheus
  Arch      rabbitmq valkey postgresql curl           gcc          python-pika shellcheck
                                                                   python-yaml prometheus
  macOS     brew install rabbitmq redis               xcode-select pip install pika pyyaml,
            postgresql@16 bash                        --install    brew install shellcheck
                                                                   prometheus
Their system services need not run: private ones are started on free ports.
END
}

# install_packages PURPOSE...: sees to it that everything for them is there.
install_packages() {
    local packages=() as_root=() log
    mapfile -t packages < <(missing_packages "$@" | sort -u)
    if ((${#packages[@]} > 0)); then
        say "missing: ${packages[*]}"
        if ! have apt-get; then
            explain_packages
            die "packages are missing on a system without apt-get"
        fi
        if ((EUID != 0)); then
            have sudo || die "root is needed to install them and there is no sudo: run 'script/services install' as root"
            as_root=(sudo)
        fi
        say "installing them with apt-get"
        log=$(mktemp)
        if ! "${as_root[@]}" bash -c "$(declare -f apt_install); apt_install \"\$@\"" bash "${packages[@]}" >"$log" 2>&1; then
            tail -n 30 "$log" >&2
            die "failed to install ${packages[*]} with apt-get: full log in $log"
        fi
        rm -f "$log"
        mapfile -t packages < <(missing_packages "$@" | sort -u)
        ((${#packages[@]} == 0)) || die "still missing after installation: ${packages[*]}"
    fi
    if [[ " $* " == *" build "* ]] && ! have cargo; then
        die "cargo is missing: install Rust from https://rustup.rs, then try again"
    fi
    [[ " $* " != *" tests "* ]] || install_nextest
}
