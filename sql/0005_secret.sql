-- What nobody but the daemons of this ledger knows: by it they tell their own
-- marks in Redis and their own headers from anybody else's.

CREATE TABLE ackonce.secret (
    only_row boolean NOT NULL DEFAULT true PRIMARY KEY CHECK (only_row),
    key      bytea   NOT NULL CHECK (pg_catalog.length(key) = 32)
);
COMMENT ON TABLE  ackonce.secret IS 'One row: the key that signs what the daemons of this ledger write where others can write too. To be read by their roles alone.';
COMMENT ON COLUMN ackonce.secret.only_row IS 'Always true: holds the table to one row.';
COMMENT ON COLUMN ackonce.secret.key      IS '32 random bytes. When it is changed, marks in Redis count no more, and headers of messages that wait in retry queues are not believed.';

-- Two random UUIDs have 244 random bits.
INSERT INTO ackonce.secret (key) VALUES (pg_catalog.decode(pg_catalog.replace(
    pg_catalog.concat(pg_catalog.gen_random_uuid(), pg_catalog.gen_random_uuid()), '-', ''), 'hex'));

COMMENT ON COLUMN ackonce.instance.ledger_id IS 'Random; part of what names and signs every Redis key, so that a mark cannot outlive the ledger it speaks of. Changes when rows are pruned before their time; change it after a restore from a backup.';
