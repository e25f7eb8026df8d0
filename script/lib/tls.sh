# shellcheck shell=bash
# TLS on the private servers, while they run: each lets in who shows a certificate
# of one authority, on a port of its own or, on PostgreSQL, by a user of its own.
# What they did without TLS they go on doing. Sourced by script/systemd-test, whose
# `sql`, `same`, `fail` and `eventually` it uses, after script/services has started them.

# make_authority FOLDER: ca.pem and its key.
make_authority() {
    openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 \
        -subj '/CN=authority' -keyout "$1/ca.key" -out "$1/ca.pem" 2>>"$1/openssl.log"
}

# issue FOLDER NAME ADDRESS: NAME.pem and NAME.key, by the folder's authority.
issue() {
    openssl req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 \
        -subj "/CN=$2" -keyout "$1/$2.key" -out "$1/$2.request" 2>>"$1/openssl.log"
    openssl x509 -req -in "$1/$2.request" -CA "$1/ca.pem" -CAkey "$1/ca.key" -days 2 \
        -set_serial "$RANDOM$RANDOM" -extfile <(printf 'subjectAltName=%s\n' "$3") \
        -out "$1/$2.pem" 2>>"$1/openssl.log"
}

# secure_postgres FOLDER USER: lets USER in by a certificate in that name alone,
# with the rights of the user that has all of them.
secure_postgres() {
    local data rules file setting
    data=$(sql 'SHOW data_directory')
    rules=$(sql 'SHOW hba_file')
    for file in server.pem server.key ca.pem; do
        install -o postgres -g postgres -m 600 "$1/$file" "$data/$file"
    done
    {
        printf 'hostssl all %s 127.0.0.1/32 cert\nhost all %s all reject\n' "$2" "$2"
        cat "$rules"
    } >"$1/pg_hba.conf"
    cat "$1/pg_hba.conf" >"$rules"
    sql "CREATE ROLE $2 LOGIN IN ROLE ackonce"
    for setting in "ssl_cert_file = 'server.pem'" "ssl_key_file = 'server.key'" \
        "ssl_ca_file = 'ca.pem'" 'ssl = on'; do
        sql "ALTER SYSTEM SET $setting"
    done
    sql 'SELECT pg_reload_conf()' >/dev/null
    eventually 20 "PostgreSQL has TLS" postgres_has_tls
}

postgres_has_tls() {
    [[ $(sql 'SHOW ssl') == on ]]
}

# redis ARGUMENT...: what the private Redis answers.
redis() {
    "$(first_of redis-cli valkey-cli)" -u "$ACKONCE_REDIS_URL" "$@"
}

# secure_redis FOLDER PORT: TLS on PORT.
secure_redis() {
    local setting
    # The port last: it is opened with what the others say.
    for setting in "tls-cert-file $1/server.pem" "tls-key-file $1/server.key" \
        "tls-ca-cert-file $1/ca.pem" "tls-auth-clients yes" "tls-port $2"; do
        # shellcheck disable=SC2086 # two words
        same "$(redis config set $setting)" OK "Redis, told $setting"
    done
}

# secure_rabbitmq FOLDER PORT: TLS on PORT. The certificates are handed over as
# bytes: a node in a chroot sees no file of ours.
secure_rabbitmq() {
    local cert key authority
    cert=$(openssl x509 -in "$1/server.pem" -outform der | base64 --wrap=0)
    key=$(openssl pkcs8 -topk8 -nocrypt -in "$1/server.key" -outform der | base64 --wrap=0)
    authority=$(openssl x509 -in "$1/ca.pem" -outform der | base64 --wrap=0)
    "$ACKONCE_RABBITMQCTL" eval "
        {ok, _} = application:ensure_all_started(ssl),
        Options = [{cert, base64:decode(\"$cert\")},
                   {key, {'PrivateKeyInfo', base64:decode(\"$key\")}},
                   {cacerts, [base64:decode(\"$authority\")]},
                   {verify, verify_peer}, {fail_if_no_peer_cert, true}],
        Listener = {\"127.0.0.1\", $2, auto},
        case erlang:function_exported(rabbit_networking, start_ssl_listener, 3) of
            true -> rabbit_networking:start_ssl_listener(Listener, Options, 1);
            false -> rabbit_networking:start_ssl_listener(Listener, Options, 1, 1)
        end." >"$1/rabbitmq.log" 2>&1 || fail "RabbitMQ does not take TLS: $(cat "$1/rabbitmq.log")"
}
