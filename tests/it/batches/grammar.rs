//! Random scripts on random messages: a batch leaves what its messages leave one
//! by one. Without a broker, on a session of the handler's own.

use ackonce::config::checked::{BatchMode, SqlHandler as Script};
use ackonce::handler::sql::SqlHandler;
use ackonce::handler::{Transactional, Work};
use ackonce::message::{Message, MessageId};
use ackonce::postgres::Session;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;
use sqlx::{AssertSqlSafe, Row};

use crate::common::World;

const TABLES: &str = "create schema @; \
     create table @.t (k int primary key, n bigint not null default 0, s text); \
     insert into @.t (k) select generate_series(0, 5); \
     create table @.log (id int generated always as identity, m text, n bigint)";

const LEFT: &str = "select 't' || t::text from @.t union all \
     select 'l' || row_number() over (order by id) || m || ' ' || n from @.log order by 1";

/// A statement; `A` and `B` are small numbers.
const STATEMENTS: &[&str] = &[
    "update @.t set n = (n * A + (body->>'n')::int + B) % 997 from message \
     where t.k = (body->>'k')::int",
    "update @.t set s = right(coalesce(s, '') || (body->>'n')::int, A + 3) from message \
     where t.k >= (body->>'k')::int",
    "insert into @.t (k, n) select (body->>'k')::int + B, (body->>'n')::int from message \
     on conflict (k) do update set n = (t.n + A * excluded.n) % 997",
    "insert into @.t (k) select (body->>'k')::int + A from message where not exists \
     (select from @.t where k = (body->>'k')::int + A)",
    "insert into @.log (m, n) select message_id, (select coalesce(sum(n), 0) from @.t) + B \
     from message",
    "delete from @.t using message where t.k = (body->>'k')::int and t.n % A = 0",
    "with gone as (delete from @.t using message where t.k = (body->>'k')::int + B \
     returning t.*) insert into @.log (m, n) select message_id, n from gone, message",
    "insert into @.log (m, n) select message_id, A from message \
     where (select count(*) from @.log) % (B + 2) = 0 returning id",
    "select count(*), max(n) from @.t, message where t.n > A",
    "update @.t set n = (select count(*) from @.log) + A where k = B",
    "do $$ begin update @.t set n = n + B where k = A; end $$",
];

fn script() -> impl Strategy<Value = String> {
    let statement = (0..STATEMENTS.len(), 1..6_u8, 0..6_u8).prop_map(|(number, a, b)| {
        let text = STATEMENTS[number].replace('A', &a.to_string());
        text.replace('B', &b.to_string())
    });
    proptest::collection::vec(statement, 1..5).prop_map(|statements| statements.join("; "))
}

/// Key and amount of each message; one without an amount cannot be applied by
/// most statements.
fn messages() -> impl Strategy<Value = Vec<(u8, Option<u8>)>> {
    proptest::collection::vec((0..6_u8, proptest::option::weighted(0.9, 1..20_u8)), 1..40)
}

struct Stage {
    session: Session,
    worlds: u32,
}

impl Stage {
    fn run(&mut self, sql: String) {
        let run = self.session.run(async |connection| {
            let query = sqlx::raw_sql(AssertSqlSafe(sql));
            query.execute(connection).await.map(drop)
        });
        run.unwrap();
    }

    /// Runs `script` in batches of `size`, as the pipeline does: what fails is
    /// left out, and the others run again. Returns what is left.
    fn apply(&mut self, script: &str, work: &[Work<'_>], size: usize) -> Vec<String> {
        self.worlds += 1;
        let schema = format!("s{}", self.worlds);
        self.run(TABLES.replace('@', &schema));
        let config = Script {
            text: script.replace('@', &schema),
            origin: "inline".to_owned(),
            batch: BatchMode::Each,
        };
        let mut handler = SqlHandler::new(&config).unwrap();
        handler.ready(&mut self.session).unwrap();
        for batch in work.chunks(size) {
            let mut batch = batch.to_vec();
            loop {
                self.session.execute("BEGIN").unwrap();
                let Err(fault) = handler.apply(&mut self.session, &batch) else {
                    break self.session.commit().unwrap();
                };
                self.session.execute("ROLLBACK").unwrap();
                batch.remove(
                    fault
                        .at
                        .unwrap_or_else(|| panic!("whose is {}?", fault.error)),
                );
            }
        }
        let left = self.session.run(async |connection| {
            let query = sqlx::raw_sql(AssertSqlSafe(LEFT.replace('@', &schema)));
            let rows = query.fetch_all(&mut *connection).await?;
            let drop = format!("drop schema {schema} cascade");
            sqlx::raw_sql(AssertSqlSafe(drop))
                .execute(connection)
                .await?;
            rows.iter().map(|row| row.try_get(0)).collect()
        });
        left.unwrap()
    }
}

#[test]
fn random_scripts_mean_for_a_batch_what_they_mean_one_by_one() {
    let world = World::new();
    let mut stage = Stage {
        session: Session::open(&world.postgres(), "test").unwrap(),
        worlds: 0,
    };
    let config = Config {
        cases: 60,
        failure_persistence: None,
        ..Config::default()
    };
    let stage = std::cell::RefCell::new(&mut stage);
    TestRunner::new(config)
        .run(&(script(), messages()), |(script, messages)| {
            let ids: Vec<MessageId> = (0..messages.len())
                .map(|place| MessageId::new(&format!("m{place}")).unwrap())
                .collect();
            let messages: Vec<Message> = messages
                .iter()
                .map(|(key, amount)| Message {
                    body: json!({"k": key, "n": amount.map_or(json!("x"), |n| json!(n))})
                        .to_string()
                        .into_bytes(),
                    ..Message::default()
                })
                .collect();
            let work: Vec<Work<'_>> = ids
                .iter()
                .zip(&messages)
                .map(|(message_id, message)| Work {
                    message_id,
                    message,
                    attempt: 1,
                })
                .collect();
            let mut stage = stage.borrow_mut();
            let wanted = stage.apply(&script, &work, 1);
            for size in [3, 40] {
                prop_assert_eq!(&stage.apply(&script, &work, size), &wanted, "{}", script);
            }
            Ok(())
        })
        .unwrap();
}
