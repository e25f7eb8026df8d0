//! The scripts. `@.` and `{schema}` are the schema. `body` has `k`, a key below 20; `n`, an
//! amount, which in one of 97 is no number; and `i`, the message's place.

pub struct Script {
    pub name: &'static str,
    pub tables: &'static str,
    pub sql: &'static str,
    /// What they left, in an order of its own.
    pub result: &'static str,
    /// Whether every order of the messages leaves the same.
    pub commutes: bool,
}

const fn script(
    name: &'static str,
    tables: &'static str,
    sql: &'static str,
    result: &'static str,
) -> Script {
    Script {
        name,
        tables,
        sql,
        result,
        commutes: false,
    }
}

const fn commuting(
    name: &'static str,
    tables: &'static str,
    sql: &'static str,
    result: &'static str,
) -> Script {
    Script {
        name,
        tables,
        sql,
        result,
        commutes: true,
    }
}

const KEYED: &str = "create table @.t (k int primary key, n bigint not null default 0, s text, \
     list int[] not null default '{}', doc jsonb not null default '{}')";
const FILLED: &str = "create table @.t (k int primary key, n bigint not null default 0, s text, \
     list int[] not null default '{}', doc jsonb not null default '{}'); \
     insert into @.t (k) select generate_series(0, 19)";
const LOG: &str = "create table @.log (id int generated always as identity, m text, n bigint)";
const T: &str = "select t::text from @.t order by k";

pub const SCRIPTS: &[Script] = &[
    commuting(
        "counter",
        FILLED,
        "update @.t set n = n + (m.body->>'n')::int from message m where t.k = (m.body->>'k')::int",
        T,
    ),
    commuting(
        "transfer",
        FILLED,
        "update @.t set n = n + case when t.k = (body->>'k')::int then -1 else 1 end \
         * (body->>'n')::int from message \
         where t.k in ((body->>'k')::int, ((body->>'k')::int + 7) % 20)",
        T,
    ),
    script(
        "insert_if_absent",
        "create table @.t (k int)",
        "insert into @.t select (body->>'k')::int + 0 * (body->>'n')::int from message \
         where not exists (select from @.t where k = (body->>'k')::int)",
        "select t::text from @.t order by k",
    ),
    script(
        "insert_if_absent_keeps_the_first",
        "create table @.t (k int, i int)",
        "insert into @.t select (body->>'k')::int + 0 * (body->>'n')::int, (body->>'i')::int \
         from message where not exists (select from @.t where k = (body->>'k')::int)",
        "select t::text from @.t order by k",
    ),
    commuting(
        "upsert_nothing",
        KEYED,
        "insert into @.t (k) select (body->>'k')::int + 0 * (body->>'n')::int from message \
         on conflict do nothing",
        T,
    ),
    commuting(
        "upsert_arithmetic",
        KEYED,
        "insert into @.t (k, n) select (body->>'k')::int, (body->>'n')::int from message \
         on conflict (k) do update set n = t.n + excluded.n",
        T,
    ),
    script(
        "last_status_wins",
        KEYED,
        "insert into @.t (k, s, n) select (body->>'k')::int, body->>'i', (body->>'n')::int \
         from message on conflict (k) do update set s = excluded.s, n = excluded.n",
        T,
    ),
    script(
        "merge",
        KEYED,
        "merge into @.t using message on t.k = (body->>'k')::int \
         when matched then update set n = (t.n * 3 + (body->>'n')::int) % 1009 \
         when not matched then insert (k, n) values ((body->>'k')::int, (body->>'n')::int)",
        T,
    ),
    script(
        "delete_using",
        "create table @.t (k int, i int)",
        "delete from @.t using message where k = (body->>'k')::int \
         and (body->>'n')::int % 2 = 0; \
         insert into @.t select (body->>'k')::int, (body->>'i')::int from message",
        "select t::text from @.t order by k, i",
    ),
    script(
        "update_with_a_join",
        "create table @.t (k int primary key, n bigint not null default 0); \
         insert into @.t select generate_series(0, 19); \
         create table @.rate (k int primary key, factor int); \
         insert into @.rate select k, k % 3 + 2 from generate_series(0, 19) as k",
        "update @.t set n = (t.n * r.factor + (m.body->>'n')::int) % 9973 from message m \
         join @.rate r on r.k = (m.body->>'k')::int where t.k = r.k",
        T,
    ),
    script(
        "data_modifying_cte",
        "create table @.a (k int, i int); create table @.b (k int, i int)",
        "with gone as (delete from @.a using message where a.k = (body->>'k')::int returning a.*), \
         come as (insert into @.a select (body->>'k')::int + 0 * (body->>'n')::int, \
         (body->>'i')::int from message) insert into @.b select * from gone",
        "select 'a' || a::text from @.a union all select 'b' || b::text from @.b order by 1",
    ),
    script(
        "statements_that_depend",
        "create table @.log (i int); create table @.t (k int primary key, n bigint); \
         insert into @.t values (0, 0)",
        "insert into @.log select (body->>'i')::int from message; \
         update @.t set n = n + (select count(*) from @.log) * (body->>'n')::int from message",
        "select t::text || (select count(*) from @.log) from @.t",
    ),
    script(
        "running_total",
        LOG,
        "insert into @.log (m, n) select message_id, (body->>'n')::int + coalesce((select n \
         from @.log order by id desc limit 1), 0) from message",
        "select m || ' ' || n from @.log order by id",
    ),
    script(
        "states_with_a_guard",
        FILLED,
        "update @.t set n = n + 1, s = body->>'i' from message where t.k = (body->>'k')::int \
         and t.n % 4 <> (body->>'n')::int % 4",
        T,
    ),
    script(
        "function_that_raises",
        "create table @.t (k int, n bigint); insert into @.t select generate_series(0, 19), 0; \
         create function @.spend(key int, amount int) returns void language plpgsql as \
         $$ begin update @.t set n = n + amount where t.k = key; \
         if amount % 5 = 4 then raise exception 'no'; end if; end $$",
        "select @.spend((body->>'k')::int, (body->>'n')::int) from message",
        T,
    ),
    script(
        "trigger_that_counts",
        "create table @.t (id int generated always as identity, m text, before bigint); \
         create function @.count() returns trigger language plpgsql as \
         $$ begin new.before := (select count(*) from @.t); return new; end $$; \
         create trigger count before insert on @.t for each row execute function @.count()",
        "insert into @.t (m) select message_id || 0 * (body->>'n')::int from message",
        "select m || ' ' || before from @.t order by id",
    ),
    script(
        "trigger_after_that_sees_the_table",
        "create table @.t (id int generated always as identity, m text); \
         create table @.seen (m text, rows bigint); \
         create function @.look() returns trigger language plpgsql as \
         $$ begin insert into @.seen select new.m, count(*) from @.t; return null; end $$; \
         create trigger look after insert on @.t for each row execute function @.look()",
        "insert into @.t (m) select message_id || 0 * (body->>'n')::int from message",
        "select m || ' ' || rows from @.seen order by rows",
    ),
    script(
        "call",
        "create table @.t (k int, n bigint); insert into @.t values (0, 1); \
         create procedure @.tick() language sql as $$ update @.t set n = (n * 5 + 3) % 10007 $$",
        "update @.t set n = n + (body->>'n')::int from message; call @.tick()",
        T,
    ),
    script(
        "do_block",
        "create table @.t (k int, n bigint); insert into @.t values (0, 1)",
        "update @.t set n = n + (body->>'n')::int from message; \
         DO $$ begin for i in 1..2 loop update @.t set n = (n * 3 + i) % 10007; end loop; end $$",
        T,
    ),
    script(
        "deferred_constraint",
        "create table @.parent (k int primary key); \
         insert into @.parent select generate_series(0, 18); \
         create table @.t (k int references @.parent deferrable initially deferred, i int)",
        "insert into @.t select (body->>'k')::int + 0 * (body->>'n')::int, (body->>'i')::int \
         from message",
        "select t::text from @.t order by i",
    ),
    script(
        "deferred_and_mended",
        "create table @.parent (k int primary key); \
         create table @.t (k int references @.parent deferrable initially deferred, i int)",
        "set constraints all deferred; \
         insert into @.t select (body->>'i')::int + 0 * (body->>'n')::int, (body->>'k')::int \
         from message; insert into @.parent select (body->>'i')::int from message",
        "select count(*)::text || ' ' || sum(k) from @.t",
    ),
    script(
        "array_append",
        FILLED,
        "update @.t set list = (list || (body->>'n')::int)[greatest(1, cardinality(list) - 8):] \
         from message where t.k = (body->>'k')::int",
        T,
    ),
    script(
        "jsonb_set_on_one_document",
        "create table @.t (k int, doc jsonb); insert into @.t values (0, '{}')",
        "update @.t set doc = jsonb_set(doc, array[body->>'k'], \
         to_jsonb(coalesce((doc->>(body->>'k'))::int, 0) * 2 % 997 + (body->>'n')::int)) \
         from message",
        "select doc::text from @.t",
    ),
    script(
        "text_grows",
        FILLED,
        "update @.t set s = right(coalesce(s, '') || (body->>'n')::int, 40) from message \
         where t.k = (body->>'k')::int",
        T,
    ),
    script(
        "returning",
        LOG,
        "insert into @.log (m, n) select message_id, (body->>'n')::int from message \
         returning id, m; \
         update @.log set n = n + 1 where id = (select max(id) from @.log) returning *",
        "select m || ' ' || n from @.log order by id",
    ),
    script(
        "set_local_path",
        FILLED,
        "set local search_path = {schema}; update t set n = (n * 2 + (body->>'n')::int) % 9973 \
         from message where t.k = (body->>'k')::int",
        T,
    ),
    script(
        "truncate_and_insert",
        "create table @.t (k int, i int)",
        "truncate @.t; insert into @.t select (body->>'n')::int, (body->>'i')::int from message",
        "select t::text from @.t",
    ),
    script(
        "lock_and_update",
        FILLED,
        "lock table @.t in exclusive mode; \
         update @.t set n = (n + 1) * (body->>'n')::int % 9973 from message \
         where t.k = (body->>'k')::int",
        T,
    ),
    commuting(
        "jsonb_operators",
        FILLED,
        "update @.t set n = n + 1 + 0 * (body->>'n')::int from message where body ? 'k' \
         and body ?& array['n', 'i'] and body @> '{}' and t.k = (body->>'k')::int % 20",
        T,
    ),
    script(
        "names_that_are_keywords",
        "create table @.t (loop int, k int, ackonce_at int, message_id text); \
         insert into @.t select 0, k, 0, '' from generate_series(0, 19) as k",
        "select loop, 'loop', $q$loop; %$q$ from @.t where loop > 5 and k % 2 = 0; \
         update @.t set loop = (t.loop * 2 + (body->>'n')::int) % 9973, \
         ackonce_at = t.ackonce_at + 1, message_id = m.message_id \
         from message m where t.k = (body->>'k')::int",
        "select loop || ' ' || ackonce_at || message_id from @.t order by k",
    ),
    script(
        "recursive",
        LOG,
        "with recursive steps as (select 1 as step union all select step + 1 from steps \
         where step < 3) insert into @.log (m, n) select message_id, step * (body->>'n')::int \
         + (select count(*) from @.log) from message, steps order by step",
        "select m || ' ' || n from @.log order by id",
    ),
    script(
        "unique_keeps_the_first",
        "create table @.t (k int primary key, i int)",
        "insert into @.t select (body->>'i')::int % 150 + 0 * (body->>'n')::int, \
         (body->>'i')::int from message",
        T,
    ),
    script(
        "values_and_table",
        "create table @.t (k int, n bigint); insert into @.t values (0, 0)",
        "values (1, 2), (3, 4); table message; (select count(*) from message); \
         update @.t set n = (n * 7 + (select sum((body->>'n')::int) from message)) % 9973",
        T,
    ),
    script(
        "notify_and_window",
        LOG,
        "notify ackonce_test; insert into @.log (m, n) select message_id, \
         (body->>'n')::int + sum(1) over () + coalesce((select max(n) % 89 from @.log), 0) \
         from message",
        "select m || ' ' || n from @.log order by id",
    ),
];
