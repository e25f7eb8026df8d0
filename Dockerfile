# ackonce in a container: a slim image with the program, the SQL and nothing to
# build with, run by a user without rights. docs/install.md says how to run it.
FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /src
# rust-toolchain.toml stays outside: this image is that toolchain.
COPY Cargo.toml Cargo.lock ./
COPY benches benches
COPY sql sql
COPY src src
RUN cargo build --locked --release --bin ackonce

FROM debian:bookworm-slim
# Of the system's authorities, whatever is current: a pinned one would distrust
# new ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 65532 --user-group --no-create-home --shell /usr/sbin/nologin ackonce
COPY --from=build /src/target/release/ackonce /usr/bin/ackonce
COPY sql /usr/share/ackonce/sql
# By number, so that Kubernetes can see that it is not root.
USER 65532:65532
# Metrics and health, once `listen` in [admin] is an address of the container's.
EXPOSE 9478
# SIGTERM drains. Give it longer than shutdown_timeout: docker stop --time.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/ackonce"]
CMD ["run", "--config", "/etc/ackonce/config.toml"]
