//! What kind of failure an error is: pure tables, no I/O.
//!
//! DESIGN rule 10: what is wrong with the world is not the message's fault.
//! `docs/failures.md` shows the tables to users and is tested against them.

use std::fmt;
use std::time::Duration;

/// What a failure asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// This message may succeed if it is tried again.
    Transient,
    /// This message will never succeed: dead-letter it.
    Permanent,
    /// The world is broken, not the message: wait until it is mended.
    Systemic,
}

impl Class {
    /// All there are, in the order of their declaration.
    pub const ALL: [Self; 3] = [Self::Transient, Self::Permanent, Self::Systemic];

    /// The name in journal, logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::Permanent => "permanent",
            Self::Systemic => "systemic",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a consumer's configuration says about codes, instead of the tables,
/// and what each of its codes fits. The longest that fits decides.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overrides(pub Vec<(String, Class)>, pub Fit);

/// Which codes a code of [`Overrides`] fits, beside itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fit {
    /// All that begin with it, as a class of SQLSTATEs does.
    #[default]
    Beginning,
    /// All that begin with it and a space: `signal` fits `signal 9`, and `1`
    /// does not fit `126`.
    Words,
}

impl Overrides {
    /// The class that the configuration gives `code`, if it does.
    #[must_use]
    pub fn class_of(&self, code: &str) -> Option<Class> {
        let whole = |start: &str| match code.strip_prefix(start) {
            Some(rest) => rest.is_empty() || rest.starts_with(' '),
            None => false,
        };
        let rows = self.0.iter().map(|(start, class)| (start.as_str(), *class));
        longest(
            rows.filter(|(start, _)| self.1 == Fit::Beginning || whole(start)),
            code,
        )
    }
}

/// The class of the longest beginning of `code` among `starts`.
fn longest<'s>(starts: impl Iterator<Item = (&'s str, Class)>, code: &str) -> Option<Class> {
    starts
        .filter(|(start, _)| code.starts_with(start))
        .max_by_key(|(start, _)| start.len())
        .map(|(_, class)| class)
}

/// Classes of the codes of one kind of handler.
#[derive(Debug)]
pub struct Table {
    /// What the codes are.
    pub title: &'static str,
    /// Codes, or beginnings of codes, each once: the longest that fits decides.
    pub rows: &'static [Row],
    /// What all other codes are; its code is empty.
    pub other: Row,
}

/// One line of a [`Table`].
#[derive(Debug)]
pub struct Row {
    /// The code, or how it begins.
    pub code: &'static str,
    /// What a failure with it asks for.
    pub class: Class,
    /// What it means, for humans.
    pub what: &'static str,
}

const fn row(code: &'static str, class: Class, what: &'static str) -> Row {
    Row { code, class, what }
}

impl Table {
    /// The class of `code`; there is one for every text.
    #[must_use]
    pub fn class_of(&self, code: &str) -> Class {
        longest(self.rows.iter().map(|row| (row.code, row.class)), code).unwrap_or(self.other.class)
    }
}

/// Why an attempt failed: its class, the database's, receiver's or program's
/// own code for it, and a text for humans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What it asks for.
    pub class: Class,
    /// SQLSTATE, HTTP status or exit status, where there is one.
    pub code: Option<String>,
    /// For humans; never the message's body.
    pub text: String,
    /// How long its source asked to be left alone, at the least.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// Whether the receiver says that it has too much to do just now: that
    /// speaks of the receiver, and is no attempt of the message's.
    #[must_use]
    pub fn asks_to_wait(&self) -> bool {
        self.class == Class::Transient && self.code.as_deref() == Some("429")
    }
}

impl Failure {
    /// Whether the database could not take a value: SQLSTATE class 22.
    #[must_use]
    pub fn is_data_exception(&self) -> bool {
        self.code
            .as_ref()
            .is_some_and(|code| code.starts_with("22"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.code {
            Some(code) => write!(f, "{} ({code}, {})", self.text, self.class),
            None => write!(f, "{} ({})", self.text, self.class),
        }
    }
}

impl std::error::Error for Failure {}

/// What PostgreSQL says, by its five-character SQLSTATE.
pub const SQLSTATES: Table = Table {
    title: "SQLSTATE",
    rows: &[
        row("08", Class::Systemic, "connection lost or refused"),
        row(
            "0A",
            Class::Systemic,
            "feature not supported, or a cached plan that no longer fits its table",
        ),
        row("22", Class::Permanent, "a value that cannot be used"),
        row(
            "23",
            Class::Transient,
            "constraint violated: the row it refers to may still be on its way",
        ),
        row(
            "25",
            Class::Systemic,
            "wrong transaction state, as on a server that is a standby now",
        ),
        row(
            "25P03",
            Class::Transient,
            "`idle_in_transaction_session_timeout`",
        ),
        row("25P04", Class::Transient, "`transaction_timeout`"),
        row("26", Class::Systemic, "a prepared statement is gone"),
        row("28", Class::Systemic, "login refused"),
        row("2D", Class::Systemic, "COMMIT or ROLLBACK in the handler"),
        row("3D", Class::Systemic, "no such database"),
        row("3F", Class::Systemic, "no such schema"),
        row("40", Class::Transient, "transaction rolled back"),
        row("40001", Class::Transient, "serialization failure: a race"),
        row("40P01", Class::Transient, "deadlock: a race"),
        row(
            "42",
            Class::Systemic,
            "syntax error; no such table or column; right missing",
        ),
        row(
            "53",
            Class::Systemic,
            "disk full, out of memory, too many connections",
        ),
        row("55", Class::Systemic, "object in use or not ready"),
        row("55P03", Class::Transient, "`lock_timeout`"),
        row("57", Class::Systemic, "server stopping or starting"),
        row(
            "57014",
            Class::Transient,
            "`statement_timeout`, or cancelled",
        ),
        row("58", Class::Systemic, "I/O error below the server"),
        row("F0", Class::Systemic, "the server's configuration"),
        row("HV", Class::Systemic, "foreign data wrapper"),
        row("P0001", Class::Permanent, "`RAISE EXCEPTION`"),
        row("XX", Class::Systemic, "internal error, corrupted data"),
    ],
    // The statement ran, and the database said no to this message.
    other: row("", Class::Permanent, "the database refuses this message"),
};

/// What an HTTP receiver answers, by status, and what happens instead of an
/// answer.
pub const HTTP: Table = Table {
    title: "HTTP",
    rows: &[
        row("3", Class::Permanent, "redirection, which is not followed"),
        row("4", Class::Permanent, "the receiver refuses this message"),
        row("401", Class::Systemic, "credentials missing or wrong"),
        row("403", Class::Systemic, "right missing"),
        row("408", Class::Transient, "the receiver waited too long"),
        row(
            "409",
            Class::Transient,
            "a call with this key is still in work",
        ),
        row("425", Class::Transient, "too early"),
        row("429", Class::Transient, "too many requests"),
        row("5", Class::Transient, "the receiver failed"),
        row("resolve", Class::Systemic, "the host has no address"),
        row("connect", Class::Systemic, "no connection"),
        row("tls", Class::Systemic, "TLS failed"),
        row("timeout", Class::Transient, "connected, but no answer yet"),
        row("broken", Class::Transient, "connection lost on the way"),
        row(
            "header",
            Class::Permanent,
            "a header of the message that HTTP cannot carry",
        ),
    ],
    other: row("", Class::Transient, "an answer that has no meaning"),
};

/// How a program ends, by exit status, and how else it does.
pub const EXITS: Table = Table {
    title: "Exit status",
    rows: &[
        row("65", Class::Permanent, "`EX_DATAERR`: bad input"),
        row("75", Class::Transient, "`EX_TEMPFAIL`"),
        row("77", Class::Systemic, "`EX_NOPERM`"),
        row("78", Class::Systemic, "`EX_CONFIG`"),
        row("126", Class::Systemic, "the program cannot be executed"),
        row("127", Class::Systemic, "the program is not found"),
        row("start", Class::Systemic, "the program was not started"),
        row("signal", Class::Transient, "killed"),
        row("timeout", Class::Transient, "killed after its time"),
        row(
            "broken",
            Class::Transient,
            "it ended, or answered what has no meaning (`mode = \"stream\"`)",
        ),
    ],
    other: row("", Class::Transient, "any other failure"),
};

/// The class of a PostgreSQL error, by its five-character SQLSTATE.
#[must_use]
pub fn class_of_sqlstate(code: &str) -> Class {
    SQLSTATES.class_of(code)
}

/// Whether a transaction that failed with this SQLSTATE only lost a race with
/// another one, and is run again at once, within the same attempt.
#[must_use]
pub fn is_race(code: &str) -> bool {
    matches!(code, "40001" | "40P01")
}

/// Why an HTTP request did not apply a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpFailure {
    /// The receiver answered, and not with 2xx.
    Status(u16),
    /// The host has no address.
    Resolve,
    /// No connection was made: nothing was sent.
    Connect,
    /// A connection was made, but no trust.
    Tls,
    /// The request was sent, and the whole answer did not come in time.
    Timeout,
    /// The connection was lost before the whole answer had come.
    Broken,
    /// The message has a header that HTTP cannot carry: nothing was sent.
    Header,
}

impl HttpFailure {
    /// Its code in the journal, in [`HTTP`] and in [`Overrides`].
    #[must_use]
    pub fn code(self) -> String {
        match self {
            Self::Status(status) => status.to_string(),
            Self::Resolve => "resolve".to_owned(),
            Self::Connect => "connect".to_owned(),
            Self::Tls => "tls".to_owned(),
            Self::Timeout => "timeout".to_owned(),
            Self::Broken => "broken".to_owned(),
            Self::Header => "header".to_owned(),
        }
    }

    /// What it asks for.
    #[must_use]
    pub fn class(self) -> Class {
        match self {
            // More digits than three are no status, though they may begin
            // like one.
            Self::Status(status) if status > 999 => HTTP.other.class,
            _ => HTTP.class_of(&self.code()),
        }
    }
}

/// The class of an HTTP status that is not 2xx.
#[must_use]
pub fn class_of_http_status(status: u16) -> Class {
    HttpFailure::Status(status).class()
}

/// Why a program did not apply a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitFailure {
    /// It ended with this status, which is not 0.
    Status(u8),
    /// This signal ended it.
    Signal(i32),
    /// It did not end in time, and its process group was killed.
    Timeout,
    /// It could not be started, or did not get ready.
    Start,
    /// It was to answer, and ended or answered what has no meaning.
    Broken,
}

impl ExitFailure {
    /// Its code in the journal, in [`EXITS`] and in [`Overrides`].
    #[must_use]
    pub fn code(self) -> String {
        match self {
            Self::Status(status) => status.to_string(),
            Self::Signal(signal) => format!("signal {signal}"),
            Self::Timeout => "timeout".to_owned(),
            Self::Start => "start".to_owned(),
            Self::Broken => "broken".to_owned(),
        }
    }

    /// What it asks for.
    #[must_use]
    pub fn class(self) -> Class {
        EXITS.class_of(&self.code())
    }
}

/// The class of an exit status that is not 0.
#[must_use]
pub fn class_of_exit_status(status: u8) -> Class {
    ExitFailure::Status(status).class()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: &str = include_str!("../docs/failures.md");

    fn markdown(table: &Table) -> String {
        let mut out = format!("| {} | class | what it is |\n|---|---|---|\n", table.title);
        for row in table.rows.iter().chain([&table.other]) {
            let code = match row.code {
                "" => "any other".to_owned(),
                code => format!("`{code}`"),
            };
            out.push_str(&format!("| {code} | {} | {} |\n", row.class, row.what));
        }
        out
    }

    #[test]
    fn the_page_for_users_holds_the_tables() {
        for table in [&SQLSTATES, &HTTP, &EXITS] {
            let header = format!("| {} | class |", table.title);
            let shown: String = PAGE
                .split_inclusive('\n')
                .skip_while(|line| !line.starts_with(&header))
                .take_while(|line| line.starts_with('|'))
                .collect();
            let wanted = markdown(table);
            assert!(
                shown == wanted,
                "docs/failures.md does not show the table as it is: put this there\n\n{wanted}"
            );
        }
    }

    #[test]
    fn no_table_names_a_code_twice() {
        for table in [&SQLSTATES, &HTTP, &EXITS] {
            let mut codes: Vec<&str> = table.rows.iter().map(|row| row.code).collect();
            codes.sort_unstable();
            codes.dedup();
            assert_eq!(codes.len(), table.rows.len(), "{}", table.title);
            assert!(codes.iter().all(|code| !code.is_empty()), "{}", table.title);
        }
    }

    #[test]
    fn the_worlds_faults_are_systemic_and_the_messages_own_are_permanent() {
        for (codes, class) in [
            (
                "23000 23502 23503 23505 23514 25P03 25P04 40000 40001 40P01 55P03 57014",
                Class::Transient,
            ),
            (
                "22000 22P02 P0001 P0002 21000 44000 54000",
                Class::Permanent,
            ),
            (
                "08000 08006 0A000 25006 25P02 26000 28P01 2D000 3D000 3F000 42501 42P01 53100 \
                 53300 55000 55006 57P01 57P03 57P05 58030 F0000 HV00N XX000 XX001",
                Class::Systemic,
            ),
        ] {
            for code in codes.split(' ') {
                assert_eq!(class_of_sqlstate(code), class, "SQLSTATE {code}");
            }
        }
        assert_eq!(class_of_sqlstate(""), Class::Permanent);
    }

    #[test]
    fn only_a_transaction_that_lost_a_race_is_run_again_at_once() {
        for code in ["40001", "40P01"] {
            assert!(is_race(code), "{code}");
            assert_eq!(class_of_sqlstate(code), Class::Transient, "{code}");
        }
        for code in ["", "40", "40000", "40P010", "55P03", "57014", "23505"] {
            assert!(!is_race(code), "{code}");
        }
    }

    #[test]
    fn a_receiver_that_cannot_be_reached_is_not_the_messages_fault() {
        for (status, class) in [
            (301, Class::Permanent),
            (400, Class::Permanent),
            (401, Class::Systemic),
            (403, Class::Systemic),
            (404, Class::Permanent),
            (408, Class::Transient),
            (422, Class::Permanent),
            (425, Class::Transient),
            (429, Class::Transient),
            (499, Class::Permanent),
            (500, Class::Transient),
            (503, Class::Transient),
            (599, Class::Transient),
            (0, Class::Transient),
            (101, Class::Transient),
            (999, Class::Transient),
            (4010, Class::Transient),
            (u16::MAX, Class::Transient),
        ] {
            assert_eq!(class_of_http_status(status), class, "{status}");
        }
        for (failure, class) in [
            (HttpFailure::Resolve, Class::Systemic),
            (HttpFailure::Connect, Class::Systemic),
            (HttpFailure::Tls, Class::Systemic),
            (HttpFailure::Timeout, Class::Transient),
            (HttpFailure::Broken, Class::Transient),
            (HttpFailure::Header, Class::Permanent),
        ] {
            assert_eq!(failure.class(), class, "{failure:?}");
            let rows = HTTP.rows.iter().filter(|row| row.code == failure.code());
            assert_eq!(rows.count(), 1, "{failure:?}");
        }
    }

    #[test]
    fn a_program_is_believed_by_its_exit_status() {
        for status in 1..=u8::MAX {
            let class = match status {
                65 => Class::Permanent,
                77 | 78 | 126 | 127 => Class::Systemic,
                _ => Class::Transient,
            };
            assert_eq!(class_of_exit_status(status), class, "{status}");
        }
        for (failure, class) in [
            (ExitFailure::Signal(9), Class::Transient),
            (ExitFailure::Signal(-1), Class::Transient),
            (ExitFailure::Timeout, Class::Transient),
            (ExitFailure::Start, Class::Systemic),
            (ExitFailure::Broken, Class::Transient),
        ] {
            assert_eq!(failure.class(), class, "{failure:?}");
            let code = failure.code();
            let rows = EXITS.rows.iter().filter(|row| code.starts_with(row.code));
            assert_eq!(rows.count(), 1, "{failure:?}");
        }
    }

    #[test]
    fn the_longest_code_that_the_configuration_names_decides() {
        let overrides = vec![
            ("23505".to_owned(), Class::Permanent),
            ("23".to_owned(), Class::Systemic),
            ("P0001".to_owned(), Class::Transient),
        ];
        let overrides = Overrides(overrides, Fit::Beginning);
        for (code, class) in [
            ("23505", Some(Class::Permanent)),
            ("23503", Some(Class::Systemic)),
            ("P0001", Some(Class::Transient)),
            ("P0002", None),
            ("2", None),
            ("", None),
        ] {
            assert_eq!(overrides.class_of(code), class, "{code}");
        }
    }

    #[test]
    fn an_exit_status_fits_itself_alone_and_a_word_all_its_kind() {
        let overrides = vec![
            ("1".to_owned(), Class::Permanent),
            ("12".to_owned(), Class::Systemic),
            ("signal".to_owned(), Class::Permanent),
            ("signal 9".to_owned(), Class::Systemic),
        ];
        let overrides = Overrides(overrides, Fit::Words);
        for (code, class) in [
            ("1", Some(Class::Permanent)),
            ("12", Some(Class::Systemic)),
            ("126", None),
            ("signal 9", Some(Class::Systemic)),
            ("signal 15", Some(Class::Permanent)),
            ("signal 99", Some(Class::Permanent)),
            ("signals", None),
        ] {
            assert_eq!(overrides.class_of(code), class, "{code}");
        }
    }

    /// Written another way: the table is asked for ever shorter beginnings.
    fn by_shortening(table: &Table, code: &str) -> Class {
        (1..=code.len())
            .rev()
            .filter_map(|length| code.get(..length))
            .find_map(|start| table.rows.iter().find(|row| row.code == start))
            .map_or(table.other.class, |row| row.class)
    }

    /// Codes that are, or nearly are, in the tables.
    fn code() -> impl Strategy<Value = String> {
        let start = (0..SQLSTATES.rows.len()).prop_map(|row| SQLSTATES.rows[row].code.to_owned());
        prop_oneof![
            "[0-9A-Z]{5}",
            (start, "[0-9A-Z]{0,3}").prop_map(|(start, rest)| start + &rest),
            "\\PC{0,6}",
        ]
    }

    proptest! {
        #[test]
        fn every_code_has_the_class_of_its_longest_beginning(code in code()) {
            for table in [&SQLSTATES, &HTTP, &EXITS] {
                prop_assert_eq!(table.class_of(&code), by_shortening(table, &code));
            }
        }

        #[test]
        fn the_order_of_overrides_does_not_matter(
            starts in prop::collection::btree_map("[0-3]{1,3}", 0..3_u8, 0..12),
            code in "[0-3]{0,4}",
        ) {
            let class = |number| match number {
                0 => Class::Transient,
                1 => Class::Permanent,
                _ => Class::Systemic,
            };
            let mut rows: Vec<_> = starts.iter().map(|(s, n)| (s.clone(), class(*n))).collect();
            let forward = Overrides(rows.clone(), Fit::Beginning).class_of(&code);
            rows.reverse();
            prop_assert_eq!(forward, Overrides(rows, Fit::Beginning).class_of(&code));
            let fits = starts.keys().any(|start| code.starts_with(start.as_str()));
            prop_assert_eq!(forward.is_some(), fits);
        }
    }
}
