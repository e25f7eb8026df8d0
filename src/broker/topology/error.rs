//! Why a topology is not there.

use std::time::Duration;

/// Why what a consumer needs on the broker is not there.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// Something of that name exists with other properties.
    #[error("failed to {action}: {text}\n  hint: {}", mismatch_hint(text))]
    Mismatch {
        /// What was tried, and on what: `declare queue orders`.
        action: String,
        /// The broker's words.
        text: String,
    },
    /// Nothing of that name exists, and the configuration says to make nothing.
    #[error(
        "failed to {action}: {text}\n  hint: make it, or set mode = \"declare\" in \
         [consumer.topology] and the daemon does"
    )]
    Missing {
        /// What was tried, and on what.
        action: String,
        /// The broker's words.
        text: String,
    },
    /// The dead-letter exchange exists and leads to no queue.
    #[error(
        "failed to find where dead letters go: no queue takes what exchange {exchange} is \
         given\n  hint: bind queue {queue} to it, or set mode = \"declare\" in \
         [consumer.topology] and the daemon does; where dead letters go by another exchange, name \
         it in dead_letter_exchange and set mode = \"none\" and dead_letters = \"publish\""
    )]
    Nowhere {
        /// The dead-letter exchange.
        exchange: String,
        /// The dead-letter queue.
        queue: String,
    },
    /// What expires in a retry queue does not come back to the work queue.
    #[error(
        "failed to find a way back from queue {retry}: what expired there did not come to queue \
         {queue} within {within:?}, and nothing is left that could hold it\n  hint: make it with \
         x-dead-letter-exchange = \"\", x-dead-letter-routing-key = \"{queue}\" and the delay in \
         milliseconds as x-message-ttl, or set mode = \"declare\" in [consumer.topology] and the \
         daemon does"
    )]
    NoWayBack {
        /// The retry queue.
        retry: String,
        /// The work queue.
        queue: String,
        /// How long was waited.
        within: Duration,
    },
    /// A queue of a kind that loses messages.
    #[error("failed to accept queue {queue}: messages would be lost in it\n  hint: {why}")]
    Unsafe {
        /// The work queue.
        queue: String,
        /// Why, and the way out.
        why: &'static str,
    },
    /// The broker makes no more of them. That may pass.
    #[error(
        "failed to {action}: {text}\n  hint: delete what nobody needs, or raise the limit \
         (rabbitmqctl set_vhost_limits)"
    )]
    Limit {
        /// What was tried, and on what.
        action: String,
        /// The broker's words.
        text: String,
    },
    /// The user lacks a right.
    #[error(
        "failed to {action}: {text}\n  hint: the daemon's user needs configure, write and read \
         permission on it; comparing an argument needs the right to configure too"
    )]
    Denied {
        /// What was tried, and on what.
        action: String,
        /// The broker's words.
        text: String,
    },
    /// The connection or the channel is gone, or something there is not up.
    #[error("failed to {action}: {text}")]
    Lost {
        /// What was tried, and on what.
        action: String,
        /// What went wrong.
        text: String,
    },
}

/// The arguments that a configuration decides about.
const KNOWN: [&str; 5] = [
    "x-queue-type",
    "x-delivery-limit",
    "x-message-ttl",
    "x-dead-letter-",
    "x-overflow",
];

fn mismatch_hint(text: &str) -> &'static str {
    if text.contains("x-dead-letter-") {
        "a message rejected there would not come to the dead-letter queue: give the queue that \
         argument by making it anew, or set mode = \"none\" and dead_letters = \"publish\" in \
         [consumer.topology], and the daemon publishes dead letters itself"
    } else if text.contains("exclusive access") {
        "the queue belongs to one connection alone, and goes with it: have it made durable and \
         not exclusive"
    } else if text.contains("invalid arg") {
        "the broker does not know this argument, or not with this value or this type of queue: \
         correct it in the configuration"
    } else if !KNOWN.iter().any(|name| text.contains(name)) && text.contains("inequivalent arg 'x-")
    {
        "the queue was made with an argument that the configuration does not give: have it made \
         anew without it, or set mode = \"none\" in [consumer.topology], which compares nothing"
    } else {
        "change the configuration to match what exists, or delete what exists if it is empty and \
         unused"
    }
}

impl TopologyError {
    /// True where trying again alone changes nothing: what is on the broker and
    /// what is configured do not fit together.
    #[must_use]
    pub fn is_config(&self) -> bool {
        match self {
            Self::Mismatch { .. }
            | Self::Missing { .. }
            | Self::Nowhere { .. }
            | Self::NoWayBack { .. }
            | Self::Unsafe { .. } => true,
            Self::Limit { .. } | Self::Denied { .. } | Self::Lost { .. } => false,
        }
    }

    pub(super) fn new(action: &str, error: &amiquip::Error) -> Self {
        let action = action.to_owned();
        match error {
            amiquip::Error::ServerClosedChannel { code, message, .. } => {
                let text = message.clone();
                match code {
                    // The broker says 404 also of a queue whose node is down.
                    404 if text.contains("no queue") || text.contains("no exchange") => {
                        Self::Missing { action, text }
                    }
                    406 if text.contains("limit") && text.contains("is reached") => {
                        Self::Limit { action, text }
                    }
                    406 => Self::Mismatch { action, text },
                    403 => Self::Denied { action, text },
                    405 => Self::Mismatch { action, text },
                    _ => Self::Lost { action, text },
                }
            }
            amiquip::Error::ServerClosedConnection { message, .. } => Self::Lost {
                action,
                text: message.clone(),
            },
            other => Self::Lost {
                action,
                text: other.to_string(),
            },
        }
    }

    pub(super) fn timed_out(action: &str, within: Duration) -> Self {
        Self::Lost {
            action: action.to_owned(),
            text: format!("no answer from the broker within {within:?}"),
        }
    }
}
