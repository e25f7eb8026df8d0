# shellcheck shell=bash
# What script/check and script/test have in common. Sourced, never run, from the
# root of the checkout. `step` is what is being done, `took` what each one took.

step=start
took=()

# run NAME COMMAND...: one step.
run() {
    local since=$SECONDS
    step=$1
    shift
    say "$step"
    "$@"
    took+=("$step $((SECONDS - since)) s")
}

check_scripts() {
    local scripts
    if ! have shellcheck; then
        say "not checked: shellcheck is not installed"
        return 0
    fi
    mapfile -t scripts < <(grep -slE '^#!/(usr/)?bin/(env )?(ba)?sh' \
        .ci/run script/* examples/handlers/* packaging/debian/*)
    shellcheck --external-sources "${scripts[@]}" script/lib/*.sh
}

# check_sources: what can be said without a server.
check_sources() {
    run "format" cargo fmt --check
    run "shell scripts" check_scripts
    run "lints" cargo clippy --locked --all-targets --features failpoints -- --deny warnings
}
