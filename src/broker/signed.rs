//! The daemon's own headers, told apart from what anybody may write into a
//! message: they count only with a signature by the ledger's secret, for this
//! consumer, message and body. Without one they are taken out, and the message is
//! what it is without them.

use std::collections::BTreeMap;
use std::sync::Arc;

use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use serde_json::Value;

use super::properties::{self, Field, Properties};
use crate::identity;
use crate::message::{Fingerprint, OWN_HEADERS, SIGNATURE_HEADER};
use crate::seal::{Seal, Sealed};

/// Signs the daemon's headers of one consumer's messages, and looks at the
/// signatures.
#[derive(Debug, Clone)]
pub struct Signer {
    seal: Seal,
    consumer: Arc<str>,
}

impl Signer {
    /// For the messages of `consumer`.
    #[must_use]
    pub fn new(seal: Seal, consumer: &str) -> Self {
        Self {
            seal,
            consumer: consumer.into(),
        }
    }

    /// Signs what `properties` have of the daemon's headers, for a message with
    /// this body.
    pub fn sign(&self, properties: &mut Properties, body: &[u8]) {
        properties.remove_header(SIGNATURE_HEADER);
        let headers = properties.headers.iter().flatten();
        let own = headers.filter(|(name, _)| is_own(name));
        let own: BTreeMap<&str, Value> = own
            .map(|(name, field)| (name.as_str(), field.to_json()))
            .collect();
        if !own.is_empty() {
            let id = properties.message_id.as_deref();
            let signature = self.signature(id, identity::fingerprint(body), &own);
            properties.set_header(SIGNATURE_HEADER, Field::Text(signature));
        }
    }

    /// As [`Signer::sign`], for the header table of a message with this id.
    pub(super) fn sign_table(&self, id: Option<&str>, body: &[u8], table: &mut FieldTable) {
        table.remove(SIGNATURE_HEADER);
        let own = own(table);
        if !own.is_empty() {
            let signature = self.signature(id, identity::fingerprint(body), &own);
            let signature = AmqpValue::LongString(signature);
            table.insert(SIGNATURE_HEADER.to_owned(), signature);
        }
    }

    /// Takes the daemon's headers out of `properties`, unless they are signed.
    pub(super) fn believe(&self, properties: &mut AmqpProperties, body: &[u8]) {
        let Some(headers) = properties.headers() else {
            return;
        };
        if !headers.keys().any(|name| is_own(name)) {
            return;
        }
        if let Some(AmqpValue::LongString(signature)) = headers.get(SIGNATURE_HEADER) {
            let headers = spelled(&own(headers));
            let id = properties.message_id().as_deref();
            let what = self.sealed(id, identity::fingerprint(body), &headers);
            if self.seal.is_signed(what, signature) {
                return;
            }
        }
        let mut left = headers.clone();
        left.retain(|name, _| !is_own(name));
        *properties = std::mem::take(properties).with_headers(left);
    }

    fn signature(
        &self,
        id: Option<&str>,
        body: Fingerprint,
        own: &BTreeMap<&str, Value>,
    ) -> String {
        self.seal.sign(self.sealed(id, body, &spelled(own)))
    }

    fn sealed<'a>(
        &'a self,
        message_id: Option<&'a str>,
        body: Fingerprint,
        headers: &'a str,
    ) -> Sealed<'a> {
        Sealed {
            consumer: &self.consumer,
            message_id,
            body,
            headers,
        }
    }
}

/// Whether a header of this name is the daemon's to write.
fn is_own(name: &str) -> bool {
    OWN_HEADERS.contains(&name) || name == SIGNATURE_HEADER
}

/// What is signed of a header table.
fn own(table: &FieldTable) -> BTreeMap<&str, Value> {
    let signed = |name: &&str| OWN_HEADERS.contains(name);
    table
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .filter(|(name, _)| signed(name))
        .map(|(name, value)| (name, properties::field(value).to_json()))
        .collect()
}

/// In one spelling, whatever the order in the table was.
fn spelled(own: &BTreeMap<&str, Value>) -> String {
    let entries = own.iter().map(|(name, value)| format!("{name:?}:{value}"));
    entries.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{ATTEMPTS_HEADER, CC_HEADER, ROUTING_KEY_HEADER};
    use crate::seal::Secret;

    fn signer() -> Signer {
        Signer::new(Secret::new([1; 32]).seal(), "orders")
    }

    fn text(text: &str) -> AmqpValue {
        AmqpValue::LongString(text.to_owned())
    }

    fn table() -> FieldTable {
        FieldTable::from([
            ("mine".to_owned(), AmqpValue::Double(0.1)),
            (ATTEMPTS_HEADER.to_owned(), AmqpValue::LongLongInt(3)),
            (ROUTING_KEY_HEADER.to_owned(), text("order.new")),
            (
                CC_HEADER.to_owned(),
                AmqpValue::FieldArray(vec![text("a"), AmqpValue::Void]),
            ),
        ])
    }

    fn believed(table: FieldTable, id: &str, body: &[u8]) -> Vec<String> {
        let mut properties = AmqpProperties::default()
            .with_message_id(id.to_owned())
            .with_headers(table);
        signer().believe(&mut properties, body);
        let mut names: Vec<String> = properties.headers().clone().unwrap().into_keys().collect();
        names.sort();
        names
    }

    #[test]
    fn signed_headers_are_believed_on_their_message_alone() {
        let mut signed = table();
        signer().sign_table(Some("m"), b"body", &mut signed);
        assert_eq!(believed(signed.clone(), "m", b"body").len(), 5);
        assert_eq!(believed(table(), "m", b"body"), ["mine"], "not signed");
        assert_eq!(believed(signed.clone(), "n", b"body"), ["mine"]);
        assert_eq!(believed(signed.clone(), "m", b"other"), ["mine"]);
        let mut more = signed.clone();
        more.insert("theirs".to_owned(), AmqpValue::Void);
        assert_eq!(believed(more, "m", b"body").len(), 6, "of no concern");
        let mut changed = signed.clone();
        changed.insert(ATTEMPTS_HEADER.to_owned(), AmqpValue::LongLongInt(0));
        assert_eq!(believed(changed, "m", b"body"), ["mine"]);
        signed.remove(CC_HEADER);
        assert_eq!(believed(signed, "m", b"body"), ["mine"], "one is missing");
    }

    #[test]
    fn a_signature_holds_whichever_way_it_was_made() {
        let mut properties = Properties::from_amqp(
            &AmqpProperties::default()
                .with_message_id("m".to_owned())
                .with_headers(table()),
        );
        signer().sign(&mut properties, b"body");
        let mut amqp = properties.to_amqp();
        signer().believe(&mut amqp, b"body");
        assert_eq!(Properties::from_amqp(&amqp), properties);
    }
}
