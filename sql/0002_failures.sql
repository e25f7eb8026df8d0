-- The journal tells of every failed attempt, crash marks find a message that
-- kills its worker, and what is older than `[ledger] retention` is deleted.

ALTER TABLE ackonce.failure
    ALTER COLUMN reason DROP NOT NULL,
    ADD COLUMN worker   integer,
    ADD COLUMN retry_in interval,
    ADD COLUMN duration interval;
COMMENT ON TABLE  ackonce.failure IS 'Failure journal: every failed attempt, and why a message was dead-lettered. Written before the broker is told, so a crash in between can leave two rows for one dead letter. A row is deleted when it is older than the retention, except that the reason of a dead letter whose message is not in the ledger is kept ten times as long.';
COMMENT ON COLUMN ackonce.failure.attempt   IS 'Tries of the handler so far, this one included; 0 when it never ran.';
COMMENT ON COLUMN ackonce.failure.reason    IS 'Why it was dead-lettered: rejected, max-attempts, crash-loop, missing-id, id-conflict, too-large or bad-header; null when it was to be tried again.';
COMMENT ON COLUMN ackonce.failure.code      IS 'SQLSTATE, HTTP status or exit status, where there is one.';
COMMENT ON COLUMN ackonce.failure.worker    IS 'Which worker of the consumer, from 1; null in rows that are older than the column.';
COMMENT ON COLUMN ackonce.failure.retry_in  IS 'How long it waits for the next attempt, at the least; null when it was dead-lettered.';
COMMENT ON COLUMN ackonce.failure.duration  IS 'How long the attempt took; null when the handler did not run.';

CREATE TABLE ackonce.suspect (
    marked_at   timestamptz NOT NULL DEFAULT now(),
    owner       bigint      NOT NULL,
    deaths      integer     NOT NULL CHECK (deaths >= 0),
    consumer_id smallint    NOT NULL,
    message_id  text        COLLATE "C" NOT NULL,
    PRIMARY KEY (consumer_id, message_id)
);
COMMENT ON TABLE  ackonce.suspect IS 'Crash marks: messages that came back unsettled and are being tried, so that one that kills its worker is found. A row goes when the message has run to an end.';
COMMENT ON COLUMN ackonce.suspect.marked_at   IS 'When it was last marked; a mark that is older than the retention is deleted.';
COMMENT ON COLUMN ackonce.suspect.owner       IS 'Whose run it is: random, one for the workers of a consumer that live and die together. A mark found with another owner is a run that never ended.';
COMMENT ON COLUMN ackonce.suspect.deaths      IS 'Runs before this one that never ended.';
COMMENT ON COLUMN ackonce.suspect.consumer_id IS 'ackonce.consumer.id of the consumer.';
COMMENT ON COLUMN ackonce.suspect.message_id  IS 'Idempotency key of the message.';

-- Dead letters in order of time, for whoever looks for old ones.
CREATE INDEX failure_dead ON ackonce.failure (failed_at) WHERE reason IS NOT NULL;

CREATE TABLE ackonce.sweep (
    relation  text        COLLATE "C" NOT NULL PRIMARY KEY,
    next_page bigint      NOT NULL DEFAULT 0 CHECK (next_page >= 0),
    swept_at  timestamptz NOT NULL DEFAULT '-infinity'
);
COMMENT ON TABLE  ackonce.sweep IS 'How far pruning has come: each round sweeps a part of each table for old rows, so that none needs an index on its times.';
COMMENT ON COLUMN ackonce.sweep.relation  IS 'Name of the table, without the schema.';
COMMENT ON COLUMN ackonce.sweep.next_page IS 'Page of the table at which the next round begins; past its end means at the start.';
COMMENT ON COLUMN ackonce.sweep.swept_at  IS 'When the last round ended.';
INSERT INTO ackonce.sweep (relation) VALUES ('ledger'), ('failure'), ('suspect');
