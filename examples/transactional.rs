//! A handler that writes through the ledger's transaction: each message takes
//! effect exactly once. In the configuration:
//!
//! ```toml
//! [consumer.handler]
//! type = "rust"
//! ```
//!
//! Run it with `cargo run --example transactional -- CONFIG`.

use std::process::ExitCode;

use ackonce::worker::{Daemon, Handler, Message, Outcome, StartError, Transaction, sqlx};

/// Each message becomes a row of the table `effect`.
struct Orders;

impl Handler for Orders {
    fn apply(
        &mut self,
        message: &Message<'_>,
        transaction: &mut Transaction<'_>,
    ) -> Result<(), Outcome> {
        self.apply_batch(&[*message], transaction)
    }

    // One statement for all of them, as many as have come in.
    fn apply_batch(
        &mut self,
        messages: &[Message<'_>],
        transaction: &mut Transaction<'_>,
    ) -> Result<(), Outcome> {
        let ids: Vec<&str> = messages.iter().map(Message::id).collect();
        let bodies: Result<Vec<&str>, _> = messages
            .iter()
            .map(|message| std::str::from_utf8(message.body()))
            .collect();
        // The batch is tried again in parts, until the message at fault stands
        // alone: only that one is dead-lettered.
        let bodies = bodies.map_err(|_| Outcome::reject("the body is not UTF-8"))?;
        transaction.run(async |connection| {
            sqlx::query(
                "INSERT INTO effect (message_id, body) \
                 SELECT id, body::jsonb FROM unnest($1::text[], $2::text[]) AS t (id, body)",
            )
            .bind(ids)
            .bind(bodies)
            .execute(connection)
            .await
        })?;
        Ok(())
    }
}

/// The daemon of the configuration at `path`, until it is told to stop.
///
/// # Errors
///
/// Everything that is wrong with the configuration.
pub fn run(path: &str) -> Result<ExitCode, StartError> {
    Ok(Daemon::from_config(path)?
        .handler("orders", || Orders)
        .run())
}

#[allow(dead_code, reason = "the tests call `run`")]
fn main() -> ExitCode {
    let path = std::env::args().nth(1);
    run(path.as_deref().unwrap_or("/etc/ackonce/config.toml")).unwrap_or_else(|error| {
        eprintln!("{error}");
        error.exit_code()
    })
}
