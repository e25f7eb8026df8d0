-- Claims of keyed handlers, whose effect is outside this database: who works on
-- a message, until when. A row becomes a ledger row when the handler is done.

-- Every message of such a consumer is inserted here and deleted again, so the
-- table is small and changes fast: it is vacuumed after so many dead rows,
-- whatever its size. The room left in each page is for renewals, which change
-- no index.
CREATE TABLE ackonce.claim (
    lease_until timestamptz NOT NULL,
    claimed_at  timestamptz NOT NULL,
    owner       bigint      NOT NULL,
    consumer_id smallint    NOT NULL,
    message_id  text        COLLATE "C" NOT NULL,
    fingerprint bytea       NOT NULL,
    holder      text        NOT NULL,
    PRIMARY KEY (consumer_id, message_id)
) WITH (
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);
COMMENT ON TABLE  ackonce.claim IS 'One row for every message that a keyed handler is at, or was at when its daemon ended. Committed before the handler runs; never beside a ledger row of the same message.';
COMMENT ON COLUMN ackonce.claim.lease_until IS 'Until when nobody else may take it, by this server''s clock; renewed while the handler runs. A row whose lease ended longer than the retention ago is deleted.';
COMMENT ON COLUMN ackonce.claim.claimed_at  IS 'When its owner made it or took it over.';
COMMENT ON COLUMN ackonce.claim.owner       IS 'Random, one for a batch of one daemon: only who knows it can renew, give back or complete the claim.';
COMMENT ON COLUMN ackonce.claim.consumer_id IS 'ackonce.consumer.id of the consumer.';
COMMENT ON COLUMN ackonce.claim.message_id  IS 'Idempotency key of the message.';
COMMENT ON COLUMN ackonce.claim.fingerprint IS 'SHA-256 of the body, 32 bytes: becomes the ledger row''s.';
COMMENT ON COLUMN ackonce.claim.holder      IS 'Host and process id of the daemon, for humans.';

INSERT INTO ackonce.sweep (relation) VALUES ('claim');
