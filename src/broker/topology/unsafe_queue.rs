//! Queues of others that cannot take messages back: streams, and queues that go
//! with their last consumer. Messages there would be lost without a word.

use std::time::Duration;

use amiquip::{Channel, QueueDeclareOptions};

use super::{Link, TopologyError, alone};

/// The header by which a stream says where a message stands in it.
pub(in crate::broker) const STREAM_HEADER: &str = "x-stream-offset";

/// Refuses the queue where it is seen to be of such a kind. False where the
/// user may not see it: comparing needs the right to configure.
///
/// The broker compares one property after the other and names the first that
/// differs; so it is asked again with what it named.
pub(super) fn refuse(
    link: &mut Link,
    queue: &str,
    within: Duration,
) -> Result<bool, TopologyError> {
    let action = format!("look at the kind of queue {queue}");
    let mut durable = true;
    // Once for each property that comes before the type.
    for _ in 0..3 {
        let declare = |channel: &Channel| {
            let options = QueueDeclareOptions {
                durable,
                ..QueueDeclareOptions::default()
            };
            channel.queue_declare(queue, options).map(drop)
        };
        let text = match alone(link, &action, within, declare) {
            Ok(()) => return Ok(true),
            Err(TopologyError::Mismatch { text, .. }) => text,
            Err(TopologyError::Denied { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        let differs = |name: &str| text.contains(&format!("inequivalent arg '{name}'"));
        match () {
            () if differs("durable") => durable = false,
            () if differs("auto_delete") => {
                return Err(TopologyError::Unsafe {
                    queue: queue.to_owned(),
                    why: "it is deleted with its last consumer, and so with every message in it \
                          at each stop and each lost connection: make it without auto-delete",
                });
            }
            () if differs("x-queue-type") && text.contains("'stream'") => {
                return Err(stream(queue));
            }
            () => return Ok(true),
        }
    }
    Ok(true)
}

/// What is wrong with a stream.
pub(in crate::broker) fn stream(queue: &str) -> TopologyError {
    TopologyError::Unsafe {
        queue: queue.to_owned(),
        why: "it is a stream: it takes no message back, has no end of a message's work, and a \
              consumer begins behind what is there; have a quorum or classic queue bound to what \
              feeds it",
    }
}

/// What `check` says where the user may not see it.
pub(super) fn unseen(queue: &str) -> String {
    format!(
        "whether queue {queue} can take messages back (it is no stream, and is not deleted with \
         its last consumer) cannot be seen without the right to configure it; a stream is refused \
         at its first message"
    )
}
