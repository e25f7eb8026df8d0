//! Field tables and strings, made readable in place.
//!
//! Type tags and lengths are those of RabbitMQ, which are the same in
//! amq-protocol for every tag RabbitMQ writes (`S T b B s u I i d f l t D F A x
//! V`) or reads (`L` too); `U` is known to amq-protocol alone. amq-protocol
//! itself drops, without a word, every entry from the first it cannot read.

/// Deepest nesting of containers that is kept, the outermost table counted.
/// amiquip's own limit is its stack; RabbitMQ's `x-death` needs three.
pub const NESTING_MAX: usize = 32;

/// Replaces what is not UTF-8 by `?`; true if there was any.
pub(super) fn mend_utf8(bytes: &mut [u8]) -> bool {
    let mut damaged = false;
    let mut rest = bytes;
    while let Err(error) = std::str::from_utf8(rest) {
        damaged = true;
        let (_, bad) = rest.split_at_mut(error.valid_up_to());
        let length = error.error_len().unwrap_or(bad.len());
        let (bad, after) = bad.split_at_mut(length);
        bad.fill(b'?');
        rest = after;
    }
    damaged
}

/// An open container: where it ends, and whether its entries have keys.
#[derive(Debug, Clone, Copy)]
struct Level {
    end: usize,
    keyed: bool,
}

/// Makes the content of a table (without its length) readable; true if anything
/// had to be rewritten. Takes time in proportion to the length, and no stack or
/// heap in proportion to the nesting.
pub(super) fn mend_table(bytes: &mut [u8]) -> bool {
    let outermost = Level {
        end: bytes.len(),
        keyed: true,
    };
    let mut levels = [outermost; NESTING_MAX];
    let mut depth = 1;
    let mut at = 0;
    let mut damaged = false;
    while depth > 0 {
        let Level { end, keyed } = levels[depth - 1];
        if at == end {
            depth -= 1;
            continue;
        }
        if keyed {
            let key_end = at + 1 + usize::from(bytes[at]);
            if key_end >= end {
                blank_entry(&mut bytes[at..end]);
                damaged = true;
                at = end;
                continue;
            }
            damaged |= mend_utf8(&mut bytes[at + 1..key_end]);
            at = key_end;
        }
        match value_of(&bytes[at..end]) {
            Value::Plain(length) => at += length,
            Value::Text(length) => {
                if std::str::from_utf8(&bytes[at + PREFIX..at + length]).is_err() {
                    bytes[at] = b'x';
                    damaged = true;
                }
                at += length;
            }
            Value::Container { length, .. } if depth == NESTING_MAX => {
                bytes[at] = b'x';
                damaged = true;
                at += length;
            }
            Value::Container { length, keyed } => {
                levels[depth] = Level {
                    end: at + length,
                    keyed,
                };
                depth += 1;
                at += PREFIX;
            }
            Value::Unreadable => {
                blank_value(&mut bytes[at..end], keyed);
                damaged = true;
                at = end;
            }
        }
    }
    damaged
}

/// Type tag and length of a value whose length varies.
const PREFIX: usize = 5;

/// What stands at the start of some bytes; lengths include the type tag.
enum Value {
    Plain(usize),
    Text(usize),
    Container { length: usize, keyed: bool },
    Unreadable,
}

fn value_of(bytes: &[u8]) -> Value {
    let Some(&tag) = bytes.first() else {
        return Value::Unreadable;
    };
    let fixed = match tag {
        b'V' => 1,
        b't' | b'b' | b'B' => 2,
        b's' | b'u' | b'U' => 3,
        b'I' | b'i' | b'f' => 5,
        b'D' => 6,
        b'l' | b'L' | b'd' | b'T' => 9,
        b'S' | b'x' | b'F' | b'A' => return value_with_length(tag, bytes),
        _ => return Value::Unreadable,
    };
    if fixed <= bytes.len() {
        Value::Plain(fixed)
    } else {
        Value::Unreadable
    }
}

fn value_with_length(tag: u8, bytes: &[u8]) -> Value {
    let Some(&[_, l0, l1, l2, l3]) = bytes.first_chunk::<PREFIX>() else {
        return Value::Unreadable;
    };
    let length = PREFIX.saturating_add(u32::from_be_bytes([l0, l1, l2, l3]) as usize);
    if length > bytes.len() {
        return Value::Unreadable;
    }
    match tag {
        b'S' => Value::Text(length),
        b'F' | b'A' => Value::Container {
            length,
            keyed: tag == b'F',
        },
        _ => Value::Plain(length),
    }
}

/// Turns the unreadable end of a table into one entry with an empty key. One
/// byte cannot be an entry: it stays, and amq-protocol passes over it.
fn blank_entry(bytes: &mut [u8]) {
    if let [key_length, value @ ..] = bytes
        && !value.is_empty()
    {
        *key_length = 0;
        blank_value(value, true);
    }
}

/// Turns the unreadable end of a container into one value: a byte array where
/// its prefix fits, else a number as long as what is left. Nothing is four
/// bytes long, so those become an empty value and what can follow one.
fn blank_value(bytes: &mut [u8], keyed: bool) {
    match bytes {
        [] => {}
        [tag] => *tag = b'V',
        [tag, _] => *tag = b'B',
        [tag, _, _] => *tag = b'u',
        [tag, l0, l1, l2, l3, content @ ..] => {
            *tag = b'x';
            // A table is part of a frame, whose length is a u32.
            [*l0, *l1, *l2, *l3] = (content.len() as u32).to_be_bytes();
        }
        [tag, rest @ ..] => {
            *tag = b'V';
            if keyed {
                blank_entry(rest);
            } else {
                blank_value(rest, keyed);
            }
        }
    }
}
