//! As much of AMQP 0-9-1 as the tap needs: which delivery carried which
//! message id, and which were acked. Everything else is stepped over.

/// Frame type, channel, length of the payload.
const HEAD: usize = 7;
/// The mark behind every payload.
const END: usize = 1;
/// The protocol header that a client begins with.
const GREETING: usize = 8;

/// What a frame told.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    Delivered {
        channel: u16,
        tag: u64,
        id: String,
    },
    Acked {
        channel: u16,
        tag: u64,
        multiple: bool,
    },
    /// Rejected or given back.
    Refused {
        channel: u16,
        tag: u64,
    },
}

/// Reads the frames of one direction of one connection.
pub struct Frames {
    /// The beginning of a frame that has not come whole.
    held: Vec<u8>,
    /// Bytes to step over before the next frame begins.
    skip: usize,
    /// Deliveries whose content header has not come yet.
    announced: Vec<(u16, u64)>,
}

impl Frames {
    pub fn from_client() -> Self {
        Self::skipping(GREETING)
    }

    pub fn from_server() -> Self {
        Self::skipping(0)
    }

    fn skipping(skip: usize) -> Self {
        Self {
            held: Vec::new(),
            skip,
            announced: Vec::new(),
        }
    }

    /// What the frames that are complete with `bytes` told.
    pub fn read(&mut self, bytes: &[u8]) -> Vec<Told> {
        self.held.extend_from_slice(bytes);
        let held = std::mem::take(&mut self.held);
        let mut rest = held.as_slice();
        let mut told = Vec::new();
        loop {
            let skipped = self.skip.min(rest.len());
            self.skip -= skipped;
            rest = &rest[skipped..];
            let Some((kind, channel, length)) = head(rest) else {
                break;
            };
            // The content of a message is of no interest.
            if kind == 3 {
                self.skip = HEAD + length + END;
                continue;
            }
            let Some(payload) = rest.get(HEAD..HEAD + length) else {
                break;
            };
            told.extend(self.frame(kind, channel, payload));
            self.skip = HEAD + length + END;
        }
        self.held = rest.to_vec();
        told
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) -> Option<Told> {
        if kind == 2 {
            let place = self.announced.iter().position(|(c, _)| *c == channel)?;
            let (_, tag) = self.announced.swap_remove(place);
            let id = message_id(payload)?;
            return Some(Told::Delivered { channel, tag, id });
        }
        if kind != 1 {
            return None;
        }
        let mut fields = Fields(payload);
        match (fields.short()?, fields.short()?) {
            (60, 60) => {
                fields.short_string()?;
                self.announced.push((channel, fields.long_long()?));
                None
            }
            (60, 80) => Some(Told::Acked {
                channel,
                tag: fields.long_long()?,
                multiple: fields.octet()? & 1 == 1,
            }),
            (60, 90 | 120) => Some(Told::Refused {
                channel,
                tag: fields.long_long()?,
            }),
            _ => None,
        }
    }
}

fn head(bytes: &[u8]) -> Option<(u8, u16, usize)> {
    let [kind, c0, c1, l0, l1, l2, l3] = *bytes.first_chunk::<HEAD>()?;
    let length = u32::from_be_bytes([l0, l1, l2, l3]);
    Some((
        kind,
        u16::from_be_bytes([c0, c1]),
        usize::try_from(length).ok()?,
    ))
}

/// The property `message_id` of a content header.
fn message_id(payload: &[u8]) -> Option<String> {
    let mut fields = Fields(payload);
    // Class, weight, length of the body.
    fields.take(12)?;
    let flags = fields.short()?;
    let is_set = |bit: u16| flags & (1 << bit) != 0;
    for bit in [15, 14] {
        // content_type, content_encoding
        is_set(bit).then(|| fields.short_string());
    }
    if is_set(13) {
        let length = fields.long()?;
        fields.take(usize::try_from(length).ok()?)?;
    }
    for bit in [12, 11] {
        // delivery_mode, priority
        is_set(bit).then(|| fields.octet());
    }
    for bit in [10, 9, 8] {
        // correlation_id, reply_to, expiration
        is_set(bit).then(|| fields.short_string());
    }
    if !is_set(7) {
        return None;
    }
    String::from_utf8(fields.short_string()?.to_vec()).ok()
}

/// Takes fields off the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn octet(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn short(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn long(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn long_long(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }

    fn short_string(&mut self) -> Option<&'a [u8]> {
        let length = self.octet()?;
        self.take(usize::from(length))
    }
}
