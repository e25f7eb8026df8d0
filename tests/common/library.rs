//! What a test needs that calls the library instead of running the binary.

use std::time::Duration;

use ackonce::config::checked::{Postgres, Secret, SslMode, Tls};
use ackonce::ledger;
use ackonce::postgres::Session;

use super::World;

impl World {
    /// A world with the schema in its database.
    pub fn migrated() -> Self {
        let world = Self::new();
        let mut session = Session::open(&world.postgres(), "test").expect("PostgreSQL answers");
        ledger::migrate(&mut session).expect("the schema is made");
        world
    }

    /// `[postgres]` for its database.
    pub fn postgres(&self) -> Postgres {
        let five = Duration::from_secs(5);
        Postgres {
            url: Secret::new(self.postgres_url().to_owned()),
            tls: Tls::default(),
            ssl_mode: SslMode::Prefer,
            allow_plaintext: false,
            connect_timeout: five,
            statement_timeout: five,
            lock_timeout: five,
            idle_in_transaction_timeout: five,
            auto_migrate: true,
        }
    }
}
