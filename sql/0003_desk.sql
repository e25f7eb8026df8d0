-- What operators did at the dead-letter desk, and to which letters.

CREATE TABLE ackonce.desk_action (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    began_at    timestamptz NOT NULL DEFAULT now(),
    ended_at    timestamptz,
    consumer_id smallint    NOT NULL,
    action      text        NOT NULL,
    operator    text        NOT NULL,
    because     text,
    filter      text        NOT NULL,
    letters     bigint      NOT NULL DEFAULT 0 CHECK (letters >= 0),
    file        text
);
COMMENT ON TABLE  ackonce.desk_action IS 'One row for every command that changed something at the dead-letter desk. Deleted when an action begins and it is ten times as old as [ledger] retention.';
COMMENT ON COLUMN ackonce.desk_action.id          IS 'Order of writing.';
COMMENT ON COLUMN ackonce.desk_action.began_at    IS 'When it began.';
COMMENT ON COLUMN ackonce.desk_action.ended_at    IS 'When it ended; null while it runs, and for ever when it was killed.';
COMMENT ON COLUMN ackonce.desk_action.consumer_id IS 'ackonce.consumer.id of the consumer.';
COMMENT ON COLUMN ackonce.desk_action.action      IS 'drop, import, replay or force-reprocess.';
COMMENT ON COLUMN ackonce.desk_action.operator    IS 'Who: login name, host and process id, as the command saw them.';
COMMENT ON COLUMN ackonce.desk_action.because     IS 'Why, in the words of the operator.';
COMMENT ON COLUMN ackonce.desk_action.filter      IS 'Which letters it was told to take, as typed.';
COMMENT ON COLUMN ackonce.desk_action.letters     IS 'How many letters it was about to act upon so far.';
COMMENT ON COLUMN ackonce.desk_action.file        IS 'The file they were written to, or read from.';

CREATE TABLE ackonce.desk_letter (
    acted_at    timestamptz NOT NULL DEFAULT now(),
    action_id   bigint      NOT NULL,
    consumer_id smallint    NOT NULL,
    message_id  text        COLLATE "C",
    fingerprint bytea       NOT NULL
);
CREATE INDEX desk_letter_message ON ackonce.desk_letter (consumer_id, message_id);
CREATE INDEX desk_letter_age ON ackonce.desk_letter USING brin (acted_at);
COMMENT ON TABLE  ackonce.desk_letter IS 'One row for every letter that an action was about to act upon. Written before the broker is told, so a crash in between leaves a row for a letter that is still there. Deleted when an action begins and it is ten times as old as [ledger] retention.';
COMMENT ON COLUMN ackonce.desk_letter.acted_at    IS 'When it was written.';
COMMENT ON COLUMN ackonce.desk_letter.action_id   IS 'ackonce.desk_action.id.';
COMMENT ON COLUMN ackonce.desk_letter.consumer_id IS 'ackonce.consumer.id of the consumer.';
COMMENT ON COLUMN ackonce.desk_letter.message_id  IS 'Idempotency key; null when the letter has no usable one.';
COMMENT ON COLUMN ackonce.desk_letter.fingerprint IS 'SHA-256 of the body, 32 bytes.';

-- Why a letter without an id is dead, without a look at all the others.
CREATE INDEX failure_anonymous ON ackonce.failure (consumer_id, fingerprint)
    WHERE message_id IS NULL;
