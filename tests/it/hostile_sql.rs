//! What others may create in a schema of the search path is never called by the
//! daemon's own statements.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::path::Path;

use crate::common::program::write_program;
use crate::common::{
    Consumer, Msg, ORDERS, RECORD_AMOUNT, RECORD_EFFECT, Tool, World, eventually, numbered,
};

/// Words before a parenthesis that are PostgreSQL's grammar, or a name that our
/// statements give.
const GRAMMAR: &[&str] = &[
    "ANY",
    "ARRAY",
    "AS",
    "BY",
    "CONFLICT",
    "EXISTS",
    "FROM",
    "IN",
    "LATERAL",
    "MATERIALIZED",
    "SELECT",
    "VALUES",
    "WHERE",
    "AND",
    "OR",
    "NOT",
    "ON",
    "UNION",
    "ALL",
    "THEN",
    "coalesce",
    "extract",
    "greatest",
    "nullif",
    "OPERATOR",
    "USING",
];

/// The literals of a file that are SQL.
fn statements(code: &str) -> Vec<String> {
    let code = code.split("#[cfg(test)]\nmod ").next().unwrap();
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let code = lines.collect::<Vec<_>>().join("\n");
    let words = ["SELECT ", "INSERT ", "UPDATE ", "DELETE ", " FROM ", "::"];
    let is_sql = |text: &&str| words.iter().any(|word| text.contains(word));
    let literals = code.split('"').skip(1).step_by(2);
    literals.filter(is_sql).map(str::to_owned).collect()
}

/// Calls and casts in `sql` that a schema of the search path could answer.
fn unqualified(sql: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in sql.match_indices('(') {
        let before = &sql[..at];
        let start = before
            .rfind(|c: char| !c.is_alphanumeric() && c != '_')
            .map_or(0, |at| at + 1);
        let name = &before[start..];
        let qualified = before[..start].ends_with("pg_catalog.");
        // A table's columns, and what WITH and AS name.
        let named = before[..start].ends_with('.')
            || ["AS ", "INTO ", "known "]
                .iter()
                .any(|word| before[..start].ends_with(word));
        // Of several arrays at once it is grammar, and never looked up.
        let several = name == "unnest" && sql[at..].split(')').next().unwrap().contains(',');
        if !several && !name.is_empty() && !qualified && !named && !GRAMMAR.contains(&name) {
            found.push(format!("{name}("));
        }
    }
    for part in sql.split("::").skip(1) {
        if !part.starts_with("pg_catalog.") && !part.starts_with(' ') {
            found.push(format!("::{part:.10}"));
        }
    }
    found
}

#[test]
fn every_function_and_type_in_our_statements_is_named_with_its_schema() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<_> = std::fs::read_dir(root.join("src/ledger"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    for other in ["src/inspect.rs", "src/postgres.rs"] {
        files.push(root.join(other));
    }
    let (mut count, mut wrong) = (0, Vec::new());
    for file in files {
        for sql in statements(&std::fs::read_to_string(&file).unwrap()) {
            count += 1;
            for what in unqualified(&sql) {
                wrong.push(format!("{}: {what} in {sql:.60}", file.display()));
            }
        }
    }
    assert!(count > 50, "the statements were not found: {count}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // What the test is to find.
    for sql in [
        "SELECT now()",
        "SELECT 1 FROM unnest($1)",
        "SELECT $1::text",
    ] {
        assert_eq!(unqualified(sql).len(), 1, "{sql}");
    }
}

/// Functions that are a better match than PostgreSQL's own, and an operator for
/// each pair of types that has none of its own: whoever calls one is told.
const HOSTILE: &str = "
    create function public.unnest(text[]) returns setof text language plpgsql
        as $$ begin raise exception 'shadowed'; end $$;
    create function public.convert_from(bytea, text) returns text language plpgsql
        as $$ begin raise exception 'shadowed'; end $$;
    do $$
    declare
        one text; other text; operator text;
        types text[] := '{int2,int4,int8,numeric,float8,text,varchar,name,bytea,oid,timestamptz,interval,jsonb,xid}';
    begin
        foreach one in array types loop foreach other in array types loop
            execute format('create function public.shadow(%s, %s) returns bool language plpgsql
                as ''begin raise exception ''''shadowed''''; end''', one, other);
            foreach operator in array '{=,<>,<,>,<=,>=,+,-,*,/,||,~~,&}'::text[] loop
                if to_regoperator(format('pg_catalog.%s(%s,%s)', operator, one, other)) is null then
                    execute format('create operator public.%s (leftarg = %s, rightarg = %s,
                        function = public.shadow)', operator, one, other);
                end if;
            end loop;
        end loop; end loop;
    end $$;";

#[test]
fn nothing_that_others_create_in_public_is_called_by_the_daemon_or_its_tools() {
    let world = World::new();
    world.db.execute(HOSTILE);
    // Looked up last, unless the daemon sees to it.
    let name = world.name();
    world.db.execute(&format!(
        "alter database {name} set search_path = public, pg_catalog"
    ));
    let orders = || {
        Consumer::orders()
            .failures("transient", &["22P02"])
            .max_attempts(2)
            .backoff(&["100ms"])
    };
    let config = world.config().consumer(orders().sql(RECORD_AMOUNT));
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("a", 5));
    let bad = Msg::new("bad").json(&serde_json::json!({ "amount": "many" }));
    world.broker.send(ORDERS, [bad]);
    eventually("one is dead", || {
        world
            .db
            .reasons(ORDERS)
            .iter()
            .any(|reason| reason == "max-attempts")
    });
    world.wait_for_effects(5);
    world.redis.flush();
    world.broker.send(ORDERS, numbered("a", 5));
    eventually("the queue is empty", || world.broker.is_empty(ORDERS));
    assert!(!daemon.logged(&["shadowed"]) && !daemon.logged(&["failed to prune"]));
    daemon.stop();

    let mended = world.config().consumer(orders().sql(RECORD_EFFECT));
    let run = |arguments: &[&str]| Tool::new(&world, &mended, arguments).run();
    run(&["check"]).expect(0);
    run(&["why", "bad"]).expect(0).says(&["max-attempts"]);
    run(&["dead", "list", ORDERS]).expect(0).says(&["bad"]);
    run(&["replay", ORDERS, "--plan"]).expect(0);
    let because = ["--because", "a test", "--yes"];
    run(&[
        &["replay", ORDERS, "--force-reprocess", "bad"],
        &because[..],
    ]
    .concat())
    .expect(0);
    run(&["ledger", "prune"]).expect(0);
    run(&["ledger", "renew-id"]).expect(0);

    let program = world.path("apply");
    write_program(&program, "#!/bin/sh\nexit 0\n");
    let keyed = Consumer::orders()
        .handler("command")
        .set("handler.argv", vec![program.to_str().unwrap()]);
    let daemon = world.run(&world.config().consumer(keyed));
    world.broker.send(ORDERS, numbered("k", 5));
    eventually("they are in the ledger", || {
        world
            .db
            .ledger(ORDERS)
            .iter()
            .filter(|id| id.starts_with("k-"))
            .count()
            == 5
    });
    assert!(!daemon.logged(&["shadowed"]));
    daemon.stop();
}

#[test]
fn check_warns_of_a_schema_on_the_path_that_others_may_create_in() {
    let world = World::new();
    let config = world.orders();
    world.prepare(&config);
    let check = || Tool::new(&world, &config, &["check"]).run().expect(0);
    assert!(!check().out.contains("search path"));
    world.db.execute("grant create on schema public to public");
    check().says(&["PostgreSQL search path", "public", "REVOKE CREATE"]);
}
