-- Ledger and failure journal. Applied by `ackonce migrate`, or by `ackonce run`
-- when `auto_migrate` is on.

CREATE SCHEMA IF NOT EXISTS ackonce;
COMMENT ON SCHEMA ackonce IS 'What the ackonce daemon has applied, and what it could not apply.';

CREATE TABLE ackonce.instance (
    only_row  boolean     NOT NULL DEFAULT true PRIMARY KEY CHECK (only_row),
    ledger_id uuid        NOT NULL DEFAULT gen_random_uuid(),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE  ackonce.instance IS 'One row: which ledger this is.';
COMMENT ON COLUMN ackonce.instance.only_row   IS 'Always true: holds the table to one row.';
COMMENT ON COLUMN ackonce.instance.ledger_id  IS 'Random; part of every Redis key, so that a mark cannot outlive the ledger it speaks of. Change it after a restore from a backup.';
COMMENT ON COLUMN ackonce.instance.created_at IS 'When this ledger was made, or its id last changed.';
INSERT INTO ackonce.instance DEFAULT VALUES;

CREATE TABLE ackonce.consumer (
    id         smallint    GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text        NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE  ackonce.consumer IS 'Names of consumers, so that a ledger row need not repeat them.';
COMMENT ON COLUMN ackonce.consumer.id         IS 'Two bytes in every ledger row and index entry.';
COMMENT ON COLUMN ackonce.consumer.name       IS 'As in the configuration, [[consumer]] name.';
COMMENT ON COLUMN ackonce.consumer.created_at IS 'When a daemon first ran this consumer.';

-- Column order is by alignment: eight bytes, two bytes, then what needs none.
-- consumer_id carries no foreign key: it would cost a lookup on every insert,
-- and rows of ackonce.consumer are never deleted by the daemon.
CREATE TABLE ackonce.ledger (
    applied_at  timestamptz NOT NULL DEFAULT now(),
    consumer_id smallint    NOT NULL,
    message_id  text        COLLATE "C" NOT NULL,
    fingerprint bytea       NOT NULL,
    PRIMARY KEY (consumer_id, message_id)
);
COMMENT ON TABLE  ackonce.ledger IS 'One row for every message that took effect, written in the transaction of its effect.';
COMMENT ON COLUMN ackonce.ledger.applied_at  IS 'Start of the transaction that applied it.';
COMMENT ON COLUMN ackonce.ledger.consumer_id IS 'ackonce.consumer.id of the consumer that applied it.';
COMMENT ON COLUMN ackonce.ledger.message_id  IS 'Idempotency key of the message, 1 to 255 bytes, unique per consumer.';
COMMENT ON COLUMN ackonce.ledger.fingerprint IS 'SHA-256 of the body, 32 bytes: tells a duplicate from another message with the same id.';

CREATE TABLE ackonce.failure (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    failed_at   timestamptz NOT NULL DEFAULT now(),
    consumer_id smallint    NOT NULL,
    attempt     integer     NOT NULL,
    message_id  text        COLLATE "C",
    fingerprint bytea       NOT NULL,
    reason      text        NOT NULL,
    class       text        NOT NULL,
    code        text,
    error       text        NOT NULL,
    handler     text        NOT NULL,
    host        text        NOT NULL,
    exchange    text        NOT NULL,
    routing_key text        NOT NULL
);
CREATE INDEX failure_message ON ackonce.failure (consumer_id, message_id);
COMMENT ON TABLE  ackonce.failure IS 'Failure journal: why a message was dead-lettered. Written before the broker is told.';
COMMENT ON COLUMN ackonce.failure.id          IS 'Order of writing.';
COMMENT ON COLUMN ackonce.failure.failed_at   IS 'When it was written.';
COMMENT ON COLUMN ackonce.failure.consumer_id IS 'ackonce.consumer.id of the consumer.';
COMMENT ON COLUMN ackonce.failure.attempt     IS 'Tries of the handler so far; 0 when it never ran.';
COMMENT ON COLUMN ackonce.failure.message_id  IS 'Idempotency key; null when the message has no usable one.';
COMMENT ON COLUMN ackonce.failure.fingerprint IS 'SHA-256 of the body, 32 bytes.';
COMMENT ON COLUMN ackonce.failure.reason      IS 'rejected, missing-id, id-conflict, too-large or bad-header.';
COMMENT ON COLUMN ackonce.failure.class       IS 'transient, permanent or systemic.';
COMMENT ON COLUMN ackonce.failure.code        IS 'SQLSTATE of the error, where there is one.';
COMMENT ON COLUMN ackonce.failure.error       IS 'The error for humans, at most 2,000 characters.';
COMMENT ON COLUMN ackonce.failure.handler     IS 'Kind of handler, such as sql.';
COMMENT ON COLUMN ackonce.failure.host        IS 'Host and process id of the daemon.';
COMMENT ON COLUMN ackonce.failure.exchange    IS 'Exchange the message was published to.';
COMMENT ON COLUMN ackonce.failure.routing_key IS 'Routing key it was published with.';
