-- A receiver's side in PostgreSQL: the key is unique, and stands beside the
-- effect because one statement writes both. A request that comes again writes
-- nothing; two at the same moment wait for each other, and one of them writes.

CREATE TABLE applied (
    key text PRIMARY KEY,           -- Idempotency-Key, or ACKONCE_IDEMPOTENCY_KEY
    fingerprint bytea NOT NULL,     -- SHA-256 of the body
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE payment (
    order_id bigint NOT NULL,
    amount numeric NOT NULL
);

-- What is run for each request, with the key and the body. `fresh`: 1 when it
-- was applied now, 0 when before. `same`: false when the key was known with
-- another body, which is an error to answer with 422.
PREPARE apply (text, bytea) AS
WITH fresh AS (
    INSERT INTO applied (key, fingerprint) VALUES ($1, sha256($2))
    ON CONFLICT (key) DO NOTHING
    RETURNING key
), effect AS (
    INSERT INTO payment (order_id, amount)
    SELECT (body->>'order_id')::bigint, (body->>'amount')::numeric
    FROM fresh, LATERAL (SELECT convert_from($2, 'UTF8')::jsonb AS body) AS request
)
SELECT (SELECT count(*) FROM fresh) AS fresh,
       coalesce((SELECT fingerprint = sha256($2) FROM applied WHERE key = $1), true) AS same;
