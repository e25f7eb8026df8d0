//! What ended a connection, a channel or a consumer, and what that means for
//! whoever runs the daemon. Pure.

use std::fmt;

use amiquip::Error;

/// What happened, sorted by what there is to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happening {
    /// The broker did not answer, or missed its heartbeats.
    Silent,
    /// The socket was closed without a word.
    Cut,
    /// The broker stops.
    Stopping,
    /// An operator closed the connection.
    Closed,
    /// The user was deleted.
    UserGone,
    /// The vhost was deleted.
    VhostGone,
    /// A right is missing, or was taken away.
    Denied,
    /// A delivery was unacknowledged for longer than the broker allows.
    AckTimeout,
    /// The broker ended the consumer: its queue is gone, or not to be had.
    Cancelled,
    /// The queue does not exist.
    QueueGone,
    /// The queue exists, and the nodes that hold it are down.
    QueueDown,
    /// Somebody else has the queue to himself.
    InUse,
    /// What the broker, or something between, sent cannot be read.
    Unreadable,
    /// The broker could not make sense of what was sent to it.
    Objection,
    /// A limit of the broker's is reached.
    Limit,
    /// Anything else: the text has to do.
    Other,
}

impl Happening {
    /// What it means and what to do, to stand behind the broker's own words;
    /// empty where those have to do.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::Silent => {
                "the broker is frozen or overloaded, or the network swallows what is sent: look at \
                 its node"
            }
            Self::Cut => {
                "the broker was killed, or the network between closed the connection: look whether \
                 its node runs"
            }
            Self::Stopping => "the broker is being stopped: start it again if that was not wanted",
            Self::Closed => "an operator closed the connection: nothing to do",
            Self::UserGone => {
                "the user was deleted: make it again with its password and permissions, or \
                 configure another one"
            }
            Self::VhostGone => {
                "the vhost is gone, and its messages with it: make it again with the user's \
                 permissions"
            }
            Self::Denied => {
                "the user lacks a permission or its password has changed: it needs configure, write \
                 and read on the queues and exchanges of its consumers"
            }
            Self::AckTimeout => {
                "deliveries were held for longer than the broker's consumer_timeout; they come \
                 again: raise it above the longest time that a message may take, or lower prefetch"
            }
            Self::Cancelled => {
                "the queue was deleted (its messages are lost to everybody), its node is gone, or a \
                 delivery was held for longer than the broker's consumer_timeout"
            }
            Self::QueueGone => "make the queue, or let the daemon do it with mode = \"declare\"",
            Self::QueueDown => {
                "the queue has no node to serve it: start the nodes that hold it; its messages are \
                 on their disks"
            }
            Self::InUse => {
                "another consumer has the queue to itself: stop that one, or have it consume \
                 without `exclusive`"
            }
            Self::Unreadable => {
                "the broker, or something between, sends what is not AMQP as known here: if a \
                 message brings it about, it stands at the head of the queue and can be taken out \
                 with the management page; a proxy between is worth a look too"
            }
            Self::Objection => {
                "the broker did not like what the daemon sent: a fault of the daemon, please report \
                 it with this line"
            }
            Self::Limit => {
                "close connections that nobody needs, or raise the limit (rabbitmqctl \
                 set_vhost_limits, set_user_limits)"
            }
            Self::Other => "",
        }
    }

    fn of_reply(code: u16, text: &str) -> Self {
        let says = |part: &str| text.contains(part);
        match code {
            320 if says("user '") => Self::UserGone,
            320 if says("vhost '") => Self::VhostGone,
            320 if says("shutdown") || says("stopped") => Self::Stopping,
            320 => Self::Closed,
            403 if says("in exclusive use") => Self::InUse,
            405 => Self::InUse,
            402 | 403 => Self::Denied,
            404 if says("is down or inaccessible") => Self::QueueDown,
            404 => Self::QueueGone,
            406 if says("delivery acknowledgement") => Self::AckTimeout,
            530 if says("is reached") => Self::Limit,
            530 if says("not found") || says("is down") => Self::VhostGone,
            530 => Self::Denied,
            501..=505 => Self::Objection,
            _ => Self::Other,
        }
    }

    fn of(error: &Error) -> Self {
        match error {
            Error::ServerClosedConnection { code, message }
            | Error::ServerClosedChannel { code, message, .. } => Self::of_reply(*code, message),
            Error::MissedServerHeartbeats => Self::Silent,
            // The guard's own words about what it would not let pass.
            Error::IoErrorReadingSocket { source }
                if source.kind() == std::io::ErrorKind::InvalidData =>
            {
                Self::Unreadable
            }
            Error::UnexpectedSocketClose
            | Error::IoErrorReadingSocket { .. }
            | Error::IoErrorWritingSocket { .. }
            | Error::EventLoopDropped
            | Error::EventLoopClientDropped => Self::Cut,
            Error::MalformedFrame
            | Error::FrameUnexpected
            | Error::ClientException
            | Error::ReceivedFrameWithBogusChannelId { .. }
            | Error::DuplicateConsumerTag { .. }
            | Error::UnknownConsumerTag { .. } => Self::Unreadable,
            _ => Self::Other,
        }
    }
}

/// Why something on the broker came to its end. `Display` is one line: what
/// happened, what it means, what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    happening: Happening,
    text: String,
}

impl Cause {
    /// In our own words.
    #[must_use]
    pub fn new(happening: Happening, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { happening, text }
    }

    pub(super) fn of(error: &Error) -> Self {
        Self::new(Happening::of(error), error.to_string())
    }

    /// What `action` came to, such as `failed to settle a delivery`.
    #[must_use]
    pub(super) fn while_it(self, action: &str) -> Self {
        Self::new(self.happening, format!("{action}: {}", self.text))
    }

    /// What kind of thing happened.
    #[must_use]
    pub fn happening(&self) -> Happening {
        self.happening
    }

    /// Whether this tells more than that the connection is gone.
    #[must_use]
    pub(super) fn is_telling(&self) -> bool {
        !matches!(self.happening, Happening::Cut | Happening::Other)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.happening.advice() {
            "" => f.write_str(&self.text),
            advice => write!(f, "{}; {advice}", self.text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_broker_says_is_sorted_by_what_there_is_to_do() {
        for (code, text, wanted) in [
            (
                320,
                "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'",
                Happening::Stopping,
            ),
            (
                320,
                "CONNECTION_FORCED - Closed via management plugin",
                Happening::Closed,
            ),
            (
                320,
                "CONNECTION_FORCED - user 'shop' was deleted",
                Happening::UserGone,
            ),
            (
                320,
                "CONNECTION_FORCED - vhost 'shop' was deleted",
                Happening::VhostGone,
            ),
            (
                403,
                "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use",
                Happening::InUse,
            ),
            (
                403,
                "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'",
                Happening::Denied,
            ),
            (
                404,
                "NOT_FOUND - no queue 'q' in vhost '/'",
                Happening::QueueGone,
            ),
            (
                404,
                "NOT_FOUND - home node 'a@b' of durable queue 'q' in vhost '/' is down or inaccessible",
                Happening::QueueDown,
            ),
            (
                405,
                "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost '/'",
                Happening::InUse,
            ),
            (
                406,
                "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 2000 ms.",
                Happening::AckTimeout,
            ),
            (
                406,
                "PRECONDITION_FAILED - unknown delivery tag 7",
                Happening::Other,
            ),
            (
                505,
                "UNEXPECTED_FRAME - expected content header",
                Happening::Objection,
            ),
            (
                530,
                "NOT_ALLOWED - vhost shop not found",
                Happening::VhostGone,
            ),
            (
                530,
                "NOT_ALLOWED - access to vhost 'shop' refused for user 'u': connection limit (1) is reached",
                Happening::Limit,
            ),
            (541, "INTERNAL_ERROR", Happening::Other),
        ] {
            let message = text.to_owned();
            let cause = Cause::of(&Error::ServerClosedConnection { code, message });
            assert_eq!(cause.happening(), wanted, "{text}");
            let line = cause.to_string();
            assert!(line.contains(text) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn what_the_guard_refused_is_told_apart_from_a_cut() {
        let refused =
            std::io::Error::new(std::io::ErrorKind::InvalidData, "method 60.61 is unknown");
        let cause = Cause::of(&Error::IoErrorReadingSocket { source: refused });
        assert_eq!(cause.happening(), Happening::Unreadable);
        assert!(cause.to_string().contains("60.61"));
        let cut = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let cause = Cause::of(&Error::IoErrorReadingSocket { source: cut });
        assert_eq!(cause.happening(), Happening::Cut);
    }
}
