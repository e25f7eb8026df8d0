-- The table that orders.sql writes to. It has no unique key on purpose: were
-- a message applied twice, two rows would show it. That each message takes
-- effect once is the ledger's work, not this table's.
CREATE TABLE IF NOT EXISTS orders (
    message_id   text        NOT NULL,
    customer     text        NOT NULL,
    amount_cents bigint      NOT NULL,
    placed_at    timestamptz NOT NULL
);

COMMENT ON TABLE orders IS 'One row for each order message that was applied.';
COMMENT ON COLUMN orders.message_id IS 'Id of the message that brought the order.';
COMMENT ON COLUMN orders.customer IS 'Who ordered.';
COMMENT ON COLUMN orders.amount_cents IS 'Amount in hundredths of the currency.';
COMMENT ON COLUMN orders.placed_at IS 'When the message was published, or applied where the publisher did not say.';
