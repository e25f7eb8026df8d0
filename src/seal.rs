//! What the ledger's secret proves: that a mark in Redis, or a header of a
//! message, was written by a daemon of this ledger. Pure.

use std::fmt;
use std::sync::Arc;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::message::{Fingerprint, MessageId, hex};

/// Bytes of a MAC that are kept: forging one takes 2^127 tries.
const MAC_BYTES: usize = 16;

/// The secret of a ledger, as its table has it.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// From the bytes of `ackonce.secret.key`.
    #[must_use]
    pub fn new(key: [u8; 32]) -> Self {
        Self(key)
    }

    /// What signs headers: the same for as long as the ledger lives, wherever
    /// it is restored.
    #[must_use]
    pub fn seal(&self) -> Seal {
        Seal(Arc::new(mac(&self.0, "headers", &[])))
    }

    /// What signs marks that speak of the ledger with this id at one place. A
    /// place is whatever a copy of the database does not share.
    #[must_use]
    pub fn marks(&self, ledger_id: &str, place: &[&str]) -> Marks {
        let mut fields = vec![ledger_id.as_bytes()];
        fields.extend(place.iter().map(|part| part.as_bytes()));
        let key = mac(&self.0, "marks", &fields);
        Marks {
            name: hex(&mac(&key, "name", &[])[..MAC_BYTES]).into(),
            key: Arc::new(key),
        }
    }
}

/// Signs the daemon's own headers.
#[derive(Clone)]
pub struct Seal(Arc<[u8; 32]>);

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seal")
    }
}

/// What a signature of headers speaks of.
#[derive(Debug, Clone, Copy)]
pub struct Sealed<'a> {
    /// The consumer's name.
    pub consumer: &'a str,
    /// The `message_id` property.
    pub message_id: Option<&'a str>,
    /// SHA-256 of the body.
    pub body: Fingerprint,
    /// The headers, in one spelling.
    pub headers: &'a str,
}

impl Seal {
    /// The signature, in hex.
    #[must_use]
    pub fn sign(&self, what: Sealed<'_>) -> String {
        hex(&self.mac(what)[..MAC_BYTES])
    }

    /// Whether `signature` is the one of `what`.
    #[must_use]
    pub fn is_signed(&self, what: Sealed<'_>, signature: &str) -> bool {
        same(self.sign(what).as_bytes(), signature.as_bytes())
    }

    fn mac(&self, what: Sealed<'_>) -> [u8; 32] {
        let id = what.message_id.map(|id| ["+", id].concat());
        mac(
            &self.0,
            "header",
            &[
                what.consumer.as_bytes(),
                id.unwrap_or_default().as_bytes(),
                &what.body.0,
                what.headers.as_bytes(),
            ],
        )
    }
}

/// Makes and reads the marks of one ledger at one place.
#[derive(Clone)]
pub struct Marks {
    name: Arc<str>,
    key: Arc<[u8; 32]>,
}

impl fmt::Debug for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Marks").field(&self.name).finish()
    }
}

impl PartialEq for Marks {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Marks {}

impl Marks {
    /// What the Redis keys of this ledger at this place have in common.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The mark that says, until `expires` in seconds since 1970, that a
    /// message of this id and body is in the ledger.
    #[must_use]
    pub fn mark(&self, consumer: &str, id: &MessageId, body: Fingerprint, expires: u64) -> String {
        let fields = [
            consumer.as_bytes(),
            id.as_str().as_bytes(),
            &body.0,
            &expires.to_be_bytes(),
        ];
        let mac = mac(&self.key, "mark", &fields);
        format!("d:{expires:x}:{}", hex(&mac[..MAC_BYTES]))
    }

    /// Whether `value` is a mark on that message, at `now` in seconds since
    /// 1970. False for anything else: another body, a forgery, one that is over.
    #[must_use]
    pub fn is_mark(
        &self,
        value: &[u8],
        consumer: &str,
        id: &MessageId,
        body: Fingerprint,
        now: u64,
    ) -> bool {
        let expires = std::str::from_utf8(value)
            .ok()
            .and_then(|text| text.strip_prefix("d:"))
            .and_then(|text| text.split_once(':'))
            .and_then(|(expires, _)| u64::from_str_radix(expires, 16).ok());
        let Some(expires) = expires.filter(|expires| *expires > now) else {
            return false;
        };
        same(self.mark(consumer, id, body, expires).as_bytes(), value)
    }
}

/// HMAC-SHA-256 of fields that no other fields spell.
fn mac(key: &[u8; 32], purpose: &str, fields: &[&[u8]]) -> [u8; 32] {
    // Whatever its length, a key is one.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else {
        return [0; 32];
    };
    for field in std::iter::once(&purpose.as_bytes()).chain(fields) {
        mac.update(&(field.len() as u64).to_be_bytes());
        mac.update(field);
    }
    mac.finalize().into_bytes().into()
}

/// In a time that tells nothing of where they differ.
fn same(one: &[u8], other: &[u8]) -> bool {
    let differing = one.iter().zip(other).fold(0, |all, (a, b)| all | (a ^ b));
    one.len() == other.len() && differing == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: Fingerprint = Fingerprint([7; 32]);
    const OTHER: Fingerprint = Fingerprint([8; 32]);

    fn id(text: &str) -> MessageId {
        MessageId::new(text).unwrap()
    }

    #[test]
    fn a_mark_counts_for_its_message_at_its_place_until_it_is_over() {
        let secret = Secret::new([1; 32]);
        let marks = secret.marks("ledger", &["server", "5"]);
        let mark = marks.mark("orders", &id("m"), BODY, 100);
        let counts = |marks: &Marks, consumer: &str, of: &str, body, now| {
            marks.is_mark(mark.as_bytes(), consumer, &id(of), body, now)
        };
        assert!(counts(&marks, "orders", "m", BODY, 99));
        assert!(!counts(&marks, "orders", "m", BODY, 100), "it is over");
        assert!(!counts(&marks, "orders", "m", OTHER, 99));
        assert!(!counts(&marks, "orders", "n", BODY, 99));
        assert!(!counts(&marks, "invoices", "m", BODY, 99));
        for (ledger, place) in [
            ("other", ["server", "5"]),
            ("ledger", ["copy", "5"]),
            ("ledger", ["server5", ""]),
        ] {
            let elsewhere = secret.marks(ledger, &place);
            assert!(!counts(&elsewhere, "orders", "m", BODY, 99));
            assert_ne!(elsewhere.name(), marks.name());
        }
        let without_secret = Secret::new([2; 32]).marks("ledger", &["server", "5"]);
        assert!(!counts(&without_secret, "orders", "m", BODY, 99));
    }

    #[test]
    fn nothing_but_a_whole_mark_is_a_mark() {
        let marks = Secret::new([1; 32]).marks("ledger", &[]);
        let mark = marks.mark("orders", &id("m"), BODY, 0x1000);
        let later = mark.replacen("1000", "2000", 1);
        let plus = mark.replacen("1000", "+1000", 1);
        let cut = &mark[..mark.len() - 1];
        let hash = format!("d:{}", hex(&BODY.0));
        for value in [
            "",
            "d:",
            "d::",
            "c:1",
            &later,
            &plus,
            cut,
            &hash,
            &mark[1..],
        ] {
            assert!(
                !marks.is_mark(value.as_bytes(), "orders", &id("m"), BODY, 1),
                "{value:?}"
            );
        }
    }

    #[test]
    fn a_signature_holds_for_these_headers_of_this_message_alone() {
        let seal = Secret::new([1; 32]).seal();
        let what = Sealed {
            consumer: "orders",
            message_id: Some("m"),
            body: BODY,
            headers: "{}",
        };
        let signature = seal.sign(what);
        assert!(seal.is_signed(what, &signature));
        assert!(!seal.is_signed(what, &signature[1..]));
        assert!(!Secret::new([2; 32]).seal().is_signed(what, &signature));
        for other in [
            Sealed {
                consumer: "other",
                ..what
            },
            Sealed {
                message_id: None,
                ..what
            },
            Sealed {
                message_id: Some(""),
                ..what
            },
            Sealed {
                body: OTHER,
                ..what
            },
            Sealed {
                headers: "",
                ..what
            },
        ] {
            assert!(!seal.is_signed(other, &signature), "{other:?}");
        }
    }
}
