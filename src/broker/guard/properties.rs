//! Content-header frames: the basic properties, walked by their flags.

use super::BODY_MAX;
use super::method::{take_array, take_long, take_short};
use super::table::{mend_table, mend_utf8};
use crate::message::Repairs;

/// How a property stands on the wire.
#[derive(Debug, Clone, Copy)]
enum Property {
    ShortString,
    MessageId,
    Headers,
    Octet,
    Timestamp,
}

/// The properties of class basic in the order of their flags, highest bit first.
const PROPERTIES: [Property; 14] = {
    use Property::{Headers, MessageId, Octet, ShortString, Timestamp};
    [
        ShortString, // content-type
        ShortString, // content-encoding
        Headers,
        Octet,       // delivery-mode
        Octet,       // priority
        ShortString, // correlation-id
        ShortString, // reply-to
        ShortString, // expiration
        MessageId,
        Timestamp,
        ShortString, // type
        ShortString, // user-id
        ShortString, // app-id
        ShortString, // cluster-id
    ]
};

/// Makes the payload of a content-header frame readable and says what it took.
///
/// Where the list does not add up, the flags from the first unreadable property
/// on are cleared: amq-protocol ignores what stands behind the last flagged
/// property. Any length before that point may be the wrong one, so the whole
/// list counts as repaired.
///
/// # Errors
/// A payload too short for its fixed part, or a body over [`BODY_MAX`]: the
/// broker counts both itself.
pub(super) fn mend(payload: &mut [u8]) -> Result<Repairs, String> {
    const CUT: &str = "content header is cut short";
    let mut rest = payload;
    let _class_and_weight: &mut [u8; 4] = take_array(&mut rest).ok_or(CUT)?;
    let body = u64::from_be_bytes(*take_array(&mut rest).ok_or(CUT)?);
    if body > BODY_MAX {
        return Err(format!(
            "content header announces {body} bytes of body, over the limit of {BODY_MAX} bytes"
        ));
    }
    let flag_bytes = take_array(&mut rest).ok_or(CUT)?;
    let flags = u16::from_be_bytes(*flag_bytes);

    let mut repairs = Repairs::default();
    for (index, &property) in PROPERTIES.iter().enumerate() {
        let flag = 0x8000 >> index;
        if flags & flag != 0 && mend_property(property, &mut rest, &mut repairs).is_none() {
            let before = !(flag | (flag - 1));
            *flag_bytes = (flags & before).to_be_bytes();
            return Ok(Repairs {
                message_id: true,
                headers: true,
                other: true,
            });
        }
    }
    Ok(repairs)
}

/// Takes one property off `rest`; `None` where it does not fit.
fn mend_property(property: Property, rest: &mut &mut [u8], repairs: &mut Repairs) -> Option<()> {
    match property {
        Property::ShortString => repairs.other |= mend_utf8(take_short(rest)?),
        Property::MessageId => repairs.message_id |= mend_utf8(take_short(rest)?),
        Property::Headers => repairs.headers |= mend_table(take_long(rest)?),
        Property::Octet => {
            rest.split_off_mut(..1)?;
        }
        Property::Timestamp => {
            rest.split_off_mut(..8)?;
        }
    }
    Some(())
}
