-- The handler of the shipped configuration: one row for each fresh message.
--
-- `message` is what the daemon provides, one row, the message at hand:
--   message_id text, body jsonb (null when the body is not JSON), payload bytea,
--   headers jsonb, exchange text, routing_key text, published_at timestamptz,
--   redelivered boolean, attempt int
--
-- An order looks like {"customer": "ada", "amount_cents": 1250}. Without a
-- whole amount or a customer it breaks a NOT NULL or a cast, and so ends in
-- the dead-letter queue with the database's error, while the other messages
-- of its batch are applied.
INSERT INTO orders (message_id, customer, amount_cents, placed_at)
SELECT
    message_id,
    body ->> 'customer',
    (body ->> 'amount_cents')::bigint,
    coalesce(published_at, now())
FROM message;
