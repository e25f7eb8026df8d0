//! stub
use crate::config::checked::Identity;
use crate::message::{DeadReason, Fingerprint, Message, MessageId};
use sha2::{Digest, Sha256};
/// f
#[must_use]
pub fn fingerprint(body: &[u8]) -> Fingerprint {
    Fingerprint(Sha256::digest(body).into())
}
/// i
pub fn identify(message: &Message, _identity: &Identity) -> Result<MessageId, DeadReason> {
    message
        .message_id
        .as_deref()
        .and_then(MessageId::new)
        .ok_or(DeadReason::MissingId)
}
