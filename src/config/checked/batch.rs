//! How a handler's SQL meets the messages of a batch.

/// `batch` in `[consumer.handler]` with `type = "sql"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchMode {
    /// The statements run for one message after the other.
    Each,
    /// Each statement runs once for all messages.
    Set,
}

impl BatchMode {
    /// Both.
    pub(in crate::config) const ALL: [Self; 2] = [Self::Each, Self::Set];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Each => "each",
            Self::Set => "set",
        }
    }

    /// How each statement of the script runs, and why.
    #[must_use]
    pub fn how(self) -> &'static str {
        match self {
            Self::Each => {
                "for one message after the other, in the order of the queue (batch = \"each\")"
            }
            Self::Set => "once for all messages of a batch (batch = \"set\")",
        }
    }
}
