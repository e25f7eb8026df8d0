//! Method frames: the strings and tables in their arguments, delivery tags, and
//! what `connection.tune` offers. Knows only what a server may send.

use super::table::{mend_table, mend_utf8};
use super::{FRAME_MAX_FLOOR, HEARTBEAT_MIN};

/// What we want of `connection.tune`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offer {
    /// Bytes.
    pub(super) frame_max: u32,
    /// Seconds.
    pub(super) heartbeat: u16,
}

/// What a method frame says to the guard.
#[derive(Debug)]
pub(super) struct Method {
    /// A content header follows on the same channel.
    pub(super) begins_content: bool,
    /// Delivery tags start anew on this channel.
    pub(super) opens_channel: bool,
    /// The longest frame, where the method says it.
    pub(super) frame_max: Option<u32>,
    /// The tag, where the content is a delivery.
    pub(super) delivery_tag: Option<u64>,
    /// Something in it was rewritten because it could not be read.
    pub(super) damaged: bool,
}

/// One argument, as far as the guard cares.
#[derive(Debug, Clone, Copy)]
enum Field {
    /// Bytes that cannot be wrong.
    Skip(usize),
    ShortString,
    LongString,
    Table,
    DeliveryTag,
    FrameMax,
    Heartbeat,
}

const CHANNEL_OPEN_OK: (u16, u16) = (20, 11);
const BASIC_RETURN: (u16, u16) = (60, 50);
const BASIC_DELIVER: (u16, u16) = (60, 60);
const BASIC_GET_OK: (u16, u16) = (60, 71);

/// The arguments of every method a server sends, by class and method id.
fn arguments(id: (u16, u16)) -> Option<&'static [Field]> {
    use Field::{
        DeliveryTag, FrameMax, Heartbeat, LongString, ShortString, Skip, Table as TableField,
    };
    Some(match id {
        // connection: start, secure, tune, open-ok, close, close-ok, blocked, unblocked
        (10, 10) => &[Skip(2), TableField, LongString, LongString],
        (10, 20) => &[LongString],
        (10, 30) => &[Skip(2), FrameMax, Heartbeat],
        (10, 41) => &[ShortString],
        (10, 50) => &[Skip(2), ShortString, Skip(4)],
        (10, 51 | 61) => &[],
        (10, 60) => &[ShortString],
        // channel: open-ok, flow, flow-ok, close, close-ok
        CHANNEL_OPEN_OK => &[LongString],
        (20, 20 | 21) => &[Skip(1)],
        (20, 40) => &[Skip(2), ShortString, Skip(4)],
        (20, 41) => &[],
        // access: request-ok
        (30, 11) => &[Skip(2)],
        // exchange: declare-ok, delete-ok, bind-ok, unbind-ok
        (40, 11 | 21 | 31 | 51) => &[],
        // queue: declare-ok, bind-ok, purge-ok, delete-ok, unbind-ok
        (50, 11) => &[ShortString, Skip(8)],
        (50, 21 | 51) => &[],
        (50, 31 | 41) => &[Skip(4)],
        // basic: qos-ok, consume-ok, cancel, cancel-ok
        (60, 11) => &[],
        (60, 21 | 31) => &[ShortString],
        (60, 30) => &[ShortString, Skip(1)],
        BASIC_RETURN => &[Skip(2), ShortString, ShortString, ShortString],
        BASIC_DELIVER => &[ShortString, DeliveryTag, Skip(1), ShortString, ShortString],
        BASIC_GET_OK => &[DeliveryTag, Skip(1), ShortString, ShortString, Skip(4)],
        // basic: get-empty, ack, nack, recover-ok
        (60, 72) => &[ShortString],
        (60, 80 | 120) => &[Skip(9)],
        (60, 111) => &[],
        // confirm: select-ok; tx: select-ok, commit-ok, rollback-ok
        (85, 11) => &[],
        (90, 11 | 21 | 31) => &[],
        _ => return None,
    })
}

/// Makes the payload of a method frame readable, or says why it cannot be.
pub(super) fn mend(payload: &mut [u8], offer: Offer) -> Result<Method, String> {
    let Some((&mut [c0, c1, m0, m1], mut rest)) = payload.split_first_chunk_mut() else {
        return Err("method frame is too short for a method".to_owned());
    };
    let id = (u16::from_be_bytes([c0, c1]), u16::from_be_bytes([m0, m1]));
    let Some(fields) = arguments(id) else {
        return Err(format!("method {}.{} is unknown from a server", id.0, id.1));
    };
    let mut method = Method {
        begins_content: matches!(id, BASIC_RETURN | BASIC_DELIVER | BASIC_GET_OK),
        opens_channel: id == CHANNEL_OPEN_OK,
        frame_max: None,
        delivery_tag: None,
        damaged: false,
    };
    for &field in fields {
        if mend_field(field, &mut rest, offer, &mut method).is_none() {
            return Err(format!(
                "arguments of method {}.{} are cut short",
                id.0, id.1
            ));
        }
    }
    Ok(method)
}

/// Takes one argument off `rest`; `None` where it does not fit.
fn mend_field(field: Field, rest: &mut &mut [u8], offer: Offer, method: &mut Method) -> Option<()> {
    match field {
        Field::Skip(count) => {
            rest.split_off_mut(..count)?;
        }
        Field::ShortString => method.damaged |= mend_utf8(take_short(rest)?),
        Field::LongString => method.damaged |= mend_utf8(take_long(rest)?),
        Field::Table => method.damaged |= mend_table(take_long(rest)?),
        Field::DeliveryTag => method.delivery_tag = Some(u64::from_be_bytes(*take_array(rest)?)),
        Field::FrameMax => {
            let bytes = take_array(rest)?;
            let limit = frame_max(u32::from_be_bytes(*bytes), offer.frame_max);
            method.frame_max = Some(limit);
            *bytes = limit.to_be_bytes();
        }
        Field::Heartbeat => {
            let bytes = take_array(rest)?;
            *bytes = heartbeat(u16::from_be_bytes(*bytes), offer.heartbeat).to_be_bytes();
        }
    }
    Some(())
}

/// The frame limit to let amiquip see, in bytes; 0 from the broker is no limit.
fn frame_max(offered: u32, wanted: u32) -> u32 {
    match offered {
        0 => wanted,
        limit => limit.min(wanted).max(FRAME_MAX_FLOOR),
    }
}

/// The heartbeat to let amiquip see, in seconds; 0 from the broker is none,
/// which would leave a dead connection unnoticed.
fn heartbeat(offered: u16, wanted: u16) -> u16 {
    match offered {
        0 => wanted,
        interval => interval.min(wanted).max(HEARTBEAT_MIN),
    }
}

/// The content of a short string at the start of `rest`.
pub(super) fn take_short<'a>(rest: &mut &'a mut [u8]) -> Option<&'a mut [u8]> {
    let [length] = *take_array(rest)?;
    rest.split_off_mut(..usize::from(length))
}

/// The content of a long string or table at the start of `rest`.
pub(super) fn take_long<'a>(rest: &mut &'a mut [u8]) -> Option<&'a mut [u8]> {
    let length = u32::from_be_bytes(*take_array(rest)?);
    rest.split_off_mut(..length as usize)
}

/// The first `N` bytes of `rest`.
pub(super) fn take_array<'a, const N: usize>(rest: &mut &'a mut [u8]) -> Option<&'a mut [u8; N]> {
    rest.split_off_mut(..N)?.first_chunk_mut()
}
