//! The guard stream: what stands between the broker's bytes and amiquip.
//!
//! amiquip parses frames by recursion and takes every string for UTF-8, so one
//! message with deeply nested headers or a broken routing key ends the process
//! or the connection, and comes back for ever. [`Guard`] watches the inbound
//! bytes frame by frame and rewrites what amiquip cannot read, **without
//! changing any length**:
//!
//! - bytes of a short string that are not UTF-8 become `?`;
//! - long strings in tables that are not UTF-8, and containers nested deeper
//!   than [`NESTING_MAX`], become byte arrays (the same length prefix under
//!   another type tag);
//! - a table whose inner lengths do not add up, or that holds an unknown type,
//!   keeps its sound entries; the rest becomes a byte array;
//! - a property list that does not add up loses the flags of what cannot be
//!   read, so the properties before it stand.
//!
//! What was rewritten is told by the [`RepairLog`], delivery by delivery.
//! `connection.tune` is rewritten too, so that a heartbeat is never off.
//!
//! Refused with [`io::ErrorKind::InvalidData`], which ends the connection, is
//! only what a broker writes itself and no message can bring about: frames over
//! their limit, a wrong frame end, unknown frame types and methods, methods cut
//! short. Outbound bytes pass as they are. Settling, dead-lettering and logging
//! belong to the consumer; nothing here blocks or does I/O of its own.

mod method;
mod properties;
mod repair_log;
mod table;

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mio::{Evented, Poll, PollOpt, Ready, Token};

use method::{Method, Offer};
pub use repair_log::{REPAIRS_MAX, RepairLog};
pub use table::NESTING_MAX;

use super::watchdog::Pulse;

/// Frame limit that RabbitMQ offers by default, in bytes, header and end byte
/// included.
pub const FRAME_MAX_DEFAULT: u32 = 131_072;

/// Smallest frame limit AMQP 0-9-1 allows, in bytes.
pub const FRAME_MAX_FLOOR: u32 = 4_096;

/// Longest content-header frame that is read, in bytes, where the negotiated
/// limit is smaller. The broker never splits a content header nor holds it to
/// the limit of the reader: dead-lettering adds to a table that already filled
/// a frame, and a publisher may have negotiated more than we did. Refusing such
/// a frame would let one message end the connection again and again.
pub const HEADER_FRAME_MAX: u32 = 1_048_576;

/// Longest body a content header may announce, in bytes: amiquip reserves that
/// much at once. No RabbitMQ accepts longer messages.
pub const BODY_MAX: u64 = 2_147_483_648;

/// Shortest heartbeat in seconds. Below it, a pause of the broker's scheduler
/// or one lost packet is taken for a dead connection.
pub const HEARTBEAT_MIN: u16 = 5;

/// Bytes asked of the inner stream at once.
const READ_AHEAD: usize = 65_536;

const FRAME_HEAD: usize = 7;
const FRAME_END: u8 = 0xCE;

/// A stream that makes the broker's frames safe to parse.
///
/// Hands out the bytes of the inner stream, at the same length. Method and
/// header frames are held until they are complete, so at most one frame is
/// buffered beside what is ready; body frames pass as they come.
#[derive(Debug)]
pub struct Guard<S> {
    inner: S,
    offer: Offer,
    log: RepairLog,
    pulse: Pulse,
    frame_max: FrameMax,
    /// `start..ready` is safe and waits to be handed out, `ready..end` is the
    /// beginning of a frame that is still incomplete.
    buffer: Vec<u8>,
    start: usize,
    ready: usize,
    end: usize,
    /// Bytes of the current body frame still to come, its end byte included.
    passing: usize,
    /// Deliveries whose content header has not come yet, one per channel.
    announced: Vec<Announced>,
    /// Why the stream was refused; every further read says so again.
    refused: Option<String>,
}

/// The longest frame that both sides of a connection take, in bytes.
#[derive(Debug, Clone)]
pub(super) struct FrameMax(Arc<AtomicU32>);

impl FrameMax {
    pub(super) fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A delivery known from its method frame.
#[derive(Debug)]
struct Announced {
    channel: u16,
    tag: u64,
    damaged: bool,
}

impl<S> Guard<S> {
    /// Guards `inner`.
    ///
    /// `frame_max` is the longest frame to negotiate, in bytes with head and
    /// end; at least [`FRAME_MAX_FLOOR`], and 0 means [`FRAME_MAX_DEFAULT`].
    /// `heartbeat` is the wanted interval in seconds, at least
    /// [`HEARTBEAT_MIN`]. Both bound what the broker offers; set the same
    /// heartbeat in amiquip's options, which takes the smaller of the two.
    pub fn new(inner: S, frame_max: u32, heartbeat: u16) -> Self {
        let frame_max = match frame_max {
            0 => FRAME_MAX_DEFAULT,
            limit => limit.max(FRAME_MAX_FLOOR),
        };
        Self {
            inner,
            offer: Offer {
                frame_max,
                heartbeat: heartbeat.max(HEARTBEAT_MIN),
            },
            log: RepairLog::default(),
            pulse: Pulse::default(),
            frame_max: FrameMax(Arc::new(AtomicU32::new(FRAME_MAX_FLOOR))),
            buffer: vec![0; READ_AHEAD],
            start: 0,
            ready: 0,
            end: 0,
            passing: 0,
            announced: Vec::new(),
            refused: None,
        }
    }

    /// What was repaired on this connection, for the consumer to ask.
    #[must_use]
    pub fn repair_log(&self) -> RepairLog {
        self.log.clone()
    }

    /// The longest frame that was agreed on, once it was.
    pub(super) fn frame_max(&self) -> FrameMax {
        self.frame_max.clone()
    }

    /// Beats when something comes in.
    pub(super) fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Makes safe as much of `ready..end` as there is.
    fn advance(&mut self) -> Result<(), String> {
        loop {
            if self.passing > 0 {
                self.pass_body()?;
                if self.passing > 0 {
                    return Ok(());
                }
            }
            let Some(frame) = FrameHead::read(&self.buffer[self.ready..self.end]) else {
                return Ok(());
            };
            frame.check(self.offer.frame_max)?;
            if matches!(frame.kind, FrameKind::Body | FrameKind::Heartbeat) {
                self.ready += FRAME_HEAD;
                self.passing = frame.payload + 1;
                continue;
            }
            if self.end - self.ready < frame.total() {
                return Ok(());
            }
            self.mend(&frame)?;
            self.ready += frame.total();
        }
    }

    /// Lets what has come of a body frame pass, and checks its end byte.
    fn pass_body(&mut self) -> Result<(), String> {
        let come = self.passing.min(self.end - self.ready);
        if come == self.passing {
            self.ready += come - 1;
            check_end(self.buffer[self.ready])?;
            self.ready += 1;
        } else {
            self.ready += come;
        }
        self.passing -= come;
        Ok(())
    }

    /// Rewrites the complete method or header frame at `ready`, in place.
    fn mend(&mut self, frame: &FrameHead) -> Result<(), String> {
        let payload_start = self.ready + FRAME_HEAD;
        let payload_end = payload_start + frame.payload;
        check_end(self.buffer[payload_end])?;
        let payload = &mut self.buffer[payload_start..payload_end];
        if frame.kind == FrameKind::Method {
            let method = method::mend(payload, self.offer)?;
            if let Some(limit) = method.frame_max {
                self.frame_max.0.store(limit, Ordering::Relaxed);
            }
            self.announce(frame.channel, &method);
            return Ok(());
        }
        let mut repairs = properties::mend(payload)?;
        let announced = self
            .announced
            .iter()
            .position(|announced| announced.channel == frame.channel);
        if let Some(index) = announced {
            let announced = self.announced.swap_remove(index);
            repairs.other |= announced.damaged;
            // Recorded before the frame is handed out: the consumer cannot see
            // the delivery earlier than its repairs.
            self.log.record(frame.channel, announced.tag, repairs);
        }
        Ok(())
    }

    /// Remembers which content header comes next on `channel`.
    fn announce(&mut self, channel: u16, method: &Method) {
        if !method.begins_content && !method.opens_channel {
            return;
        }
        self.announced
            .retain(|announced| announced.channel != channel);
        if method.opens_channel {
            self.log.forget(channel);
        }
        if let Some(tag) = method.delivery_tag {
            self.announced.push(Announced {
                channel,
                tag,
                damaged: method.damaged,
            });
        }
    }

    /// Makes room for at least one byte more, and for the whole of the frame
    /// that is being held. Called when nothing is ready.
    fn make_room(&mut self) {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            self.ready = 0;
        }
        let held = FrameHead::read(&self.buffer[..self.end]).map_or(FRAME_HEAD, |f| f.total());
        if held > self.buffer.len() {
            self.buffer.resize(held, 0);
        }
    }
}

impl<S: Read> Read for Guard<S> {
    /// Fails with [`io::ErrorKind::WouldBlock`] only when the inner stream did
    /// and nothing is ready; `Ok(0)` is the end of the inner stream, also where
    /// it came in the middle of a frame.
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            if self.ready > self.start {
                let count = out.len().min(self.ready - self.start);
                out[..count].copy_from_slice(&self.buffer[self.start..self.start + count]);
                self.start += count;
                return Ok(count);
            }
            if let Some(reason) = &self.refused {
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason.clone()));
            }
            self.make_room();
            match self.inner.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Ok(0),
                Ok(count) => {
                    self.pulse.beat();
                    self.end += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if let Err(cause) = self.advance() {
                self.refused = Some(format!("failed to read a frame from the broker: {cause}"));
            }
        }
    }
}

impl<S: Write> Write for Guard<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<S: Evented> Evented for Guard<S> {
    fn register(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        self.inner.register(poll, token, interest, opts)
    }

    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        self.inner.reregister(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.inner.deregister(poll)
    }
}

impl<S: Read + Write + Evented + Send + 'static> amiquip::IoStream for Guard<S> {}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FrameKind {
    Method,
    Header,
    Body,
    Heartbeat,
    Unknown(u8),
}

/// The first seven bytes of a frame.
#[derive(Debug)]
struct FrameHead {
    kind: FrameKind,
    channel: u16,
    /// Bytes between head and end byte.
    payload: usize,
}

impl FrameHead {
    fn read(bytes: &[u8]) -> Option<Self> {
        let [kind, c0, c1, s0, s1, s2, s3] = *bytes.first_chunk::<FRAME_HEAD>()?;
        let kind = match kind {
            1 => FrameKind::Method,
            2 => FrameKind::Header,
            3 => FrameKind::Body,
            8 => FrameKind::Heartbeat,
            other => FrameKind::Unknown(other),
        };
        Some(Self {
            kind,
            channel: u16::from_be_bytes([c0, c1]),
            payload: u32::from_be_bytes([s0, s1, s2, s3]) as usize,
        })
    }

    /// Length of the whole frame in bytes, head and end included.
    fn total(&self) -> usize {
        self.payload.saturating_add(FRAME_HEAD + 1)
    }

    fn check(&self, frame_max: u32) -> Result<(), String> {
        let limit = match self.kind {
            FrameKind::Unknown(kind) => {
                return Err(format!(
                    "frame type {kind} is unknown; hint: is this port AMQP 0-9-1, and TLS where \
                     the URL says so?"
                ));
            }
            FrameKind::Header => frame_max.max(HEADER_FRAME_MAX),
            FrameKind::Method | FrameKind::Body | FrameKind::Heartbeat => frame_max,
        };
        if self.total() > limit as usize {
            return Err(format!(
                "{:?} frame of {} bytes on channel {} is over the limit of {limit} bytes",
                self.kind,
                self.total(),
                self.channel
            ));
        }
        Ok(())
    }
}

fn check_end(byte: u8) -> Result<(), String> {
    if byte == FRAME_END {
        Ok(())
    } else {
        Err(format!(
            "frame ends with {byte:#04x} where {FRAME_END:#04x} belongs"
        ))
    }
}

#[cfg(test)]
mod tests;
