//! Why a desk cannot go on.

use std::time::Duration;

use thiserror::Error;

use crate::broker::error::ConnectError;

/// Why a desk cannot go on. What it held goes back to the queue.
#[derive(Debug, Error)]
pub enum DeskError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// There is no such queue.
    #[error(
        "failed to open queue {queue}: {text}\n  hint: the dead-letter queue is made when the \
         daemon first runs; if it has another name, say so with dead_letter_queue in \
         [consumer.topology]"
    )]
    Missing {
        /// The queue.
        queue: String,
        /// The broker's words.
        text: String,
    },
    /// The user lacks a right.
    #[error("failed to open queue {queue}: {text}\n  hint: the user needs read permission on it")]
    Denied {
        /// The queue.
        queue: String,
        /// The broker's words.
        text: String,
    },
    /// It has letters and hands none out.
    #[error(
        "queue {queue} says that {ready} letters are ready and hands none out\n  hint: another \
         consumer is its single active one, or has a higher priority: end it first"
    )]
    Stalled {
        /// The queue.
        queue: String,
        /// How many it says are ready.
        ready: u32,
    },
    /// One more return could have the broker drop a letter.
    #[error(
        "queue {queue}: a letter came back {returns} times, and since RabbitMQ 4.0 a quorum queue \
         drops what came back 20 times unless it has another limit\n  hint: take the limit off \
         with a policy (rabbitmqctl set_policy --apply-to quorum_queues NAME PATTERN \
         '{{\"delivery-limit\": -1}}'), then say --despite-delivery-limit"
    )]
    NearLimit {
        /// The queue.
        queue: String,
        /// How often it came back.
        returns: i64,
    },
    /// Letters were held so long that the broker is about to take them back.
    #[error(
        "queue {queue}: letters were held for {}, and the broker takes back what is held for half \
         an hour\n  hint: run it again: it goes on with what is left", minutes(*held)
    )]
    Held {
        /// The queue.
        queue: String,
        /// For how long.
        held: Duration,
    },
    /// It was told to stop.
    #[error("stopped")]
    Stopped,
    /// The connection or the channel is gone.
    #[error("lost queue {queue}: {cause}")]
    Lost {
        /// The queue.
        queue: String,
        /// The broker's or the socket's words.
        cause: String,
    },
}

fn minutes(held: Duration) -> String {
    format!("{} minutes", held.as_secs() / 60)
}
