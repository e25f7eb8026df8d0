//! What kind of failure an error is: pure tables, no I/O.
//!
//! DESIGN rule 10: what is wrong with the world is not the message's fault.

use std::fmt;

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

/// What a consumer's configuration says about codes, instead of the tables:
/// whole codes, or beginnings of codes such as the two characters of a
/// SQLSTATE class. The longest that fits decides.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overrides(pub Vec<(String, Class)>);

impl Overrides {
    /// The class that the configuration gives `code`, if it does.
    #[must_use]
    pub fn class_of(&self, code: &str) -> Option<Class> {
        self.0
            .iter()
            .filter(|(start, _)| code.starts_with(start.as_str()))
            .max_by_key(|(start, _)| start.len())
            .map(|(_, class)| *class)
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

/// Whether `code` says that a transaction lost a race with another one, and
/// would do well to run again at once: a serialization failure or a deadlock.
#[must_use]
pub fn is_race(code: &str) -> bool {
    matches!(code, "40001" | "40P01")
}

/// The class of a PostgreSQL error, by its five-character SQLSTATE.
///
/// Codes that are not in the table are permanent: the statement ran and the
/// database said no to this message.
#[must_use]
pub fn class_of_sqlstate(code: &str) -> Class {
    match code {
        // serialization_failure, deadlock_detected, lock_not_available,
        // query_canceled (statement_timeout)
        "40001" | "40P01" | "55P03" | "57014" => Class::Transient,
        // idle_in_transaction_session_timeout, transaction_timeout
        "25P03" | "25P04" => Class::Transient,
        _ => match code.get(..2) {
            // connection exception; feature not supported, which is also a
            // cached plan that no longer fits its table; invalid transaction
            // state, such as a standby after a failover; a prepared statement
            // that is gone; invalid transaction termination; invalid
            // authorization; invalid catalog; syntax error or missing table or
            // right; insufficient resources; object not in prerequisite state;
            // operator intervention; system error; internal error
            Some(
                "08" | "0A" | "25" | "26" | "28" | "2D" | "3D" | "42" | "53" | "55" | "57" | "58"
                | "XX",
            ) => Class::Systemic,
            _ => Class::Permanent,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worlds_faults_are_systemic_and_the_messages_own_are_permanent() {
        for (code, class) in [
            ("40001", Class::Transient),
            ("40P01", Class::Transient),
            ("55P03", Class::Transient),
            ("57014", Class::Transient),
            ("25006", Class::Systemic),
            ("08006", Class::Systemic),
            ("0A000", Class::Systemic),
            ("25P02", Class::Systemic),
            ("25P03", Class::Transient),
            ("26000", Class::Systemic),
            ("2D000", Class::Systemic),
            ("55006", Class::Systemic),
            ("28P01", Class::Systemic),
            ("3D000", Class::Systemic),
            ("42P01", Class::Systemic),
            ("53100", Class::Systemic),
            ("57P01", Class::Systemic),
            ("58030", Class::Systemic),
            ("XX000", Class::Systemic),
            ("22P02", Class::Permanent),
            ("23505", Class::Permanent),
            ("P0001", Class::Permanent),
            ("", Class::Permanent),
        ] {
            assert_eq!(class_of_sqlstate(code), class, "SQLSTATE {code:?}");
        }
    }
}
