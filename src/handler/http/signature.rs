//! Signatures as Standard Webhooks 1.0.0 has them: HMAC-SHA256 over id, time
//! and body, in base64, one for each secret.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::config::checked::Secret;
use crate::config::defaults::SIGNING_SECRET_PREFIX;

/// The keys that sign, the newest first.
#[derive(Clone)]
pub(super) struct Signer(Vec<Hmac<Sha256>>);

impl Signer {
    /// `None` where a secret is not base64.
    pub(super) fn new(secrets: &[Secret]) -> Option<Self> {
        let keys = secrets.iter().map(|secret| {
            let text = secret.expose();
            let digits = text.strip_prefix(SIGNING_SECRET_PREFIX).unwrap_or(text);
            Hmac::new_from_slice(&BASE64_STANDARD.decode(digits).ok()?).ok()
        });
        keys.collect::<Option<_>>().map(Self)
    }

    /// Whether it signs at all.
    pub(super) fn signs(&self) -> bool {
        !self.0.is_empty()
    }

    /// The value of `webhook-signature`: all signatures, with spaces between
    /// them. Neither id nor time may hold a full stop.
    pub(super) fn sign(&self, id: &str, seconds: &str, body: &[u8]) -> String {
        let signatures: Vec<String> = self
            .0
            .iter()
            .map(|key| {
                let mut mac = key.clone();
                for part in [id.as_bytes(), b".", seconds.as_bytes(), b".", body] {
                    mac.update(part);
                }
                let signature = BASE64_STANDARD.encode(mac.finalize().into_bytes());
                format!("v1,{signature}")
            })
            .collect();
        signatures.join(" ")
    }
}

/// `key` without full stops, as `webhook-id` must be. They become `%2E`, so two
/// keys stay two: a `%` is in a key only where something is encoded.
pub(super) fn webhook_id(key: &str) -> String {
    key.replace('.', "%2E")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the tests of the standard's own libraries.
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const SIGNED: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    fn sign(secrets: &[&str]) -> String {
        let secrets: Vec<Secret> = secrets.iter().map(|s| Secret::new((*s).into())).collect();
        Signer::new(&secrets).unwrap().sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            "1614265330",
            b"{\"test\": 2432232314}",
        )
    }

    #[test]
    fn the_signature_is_the_standards() {
        assert_eq!(sign(&[SECRET]), SIGNED);
        assert_eq!(sign(&[SECRET.trim_start_matches("whsec_")]), SIGNED);
    }

    #[test]
    fn each_secret_signs() {
        let other = BASE64_STANDARD.encode([1; 24]);
        let both = sign(&[&other, SECRET]);
        let (new, old) = both.split_once(' ').unwrap();
        assert_eq!(old, SIGNED);
        assert!(new.starts_with("v1,") && new != SIGNED, "{new}");
    }

    #[test]
    fn an_id_has_no_full_stop_and_stays_its_own() {
        assert_eq!(webhook_id("a.b:c.d"), "a%2Eb:c%2Ed");
        // An id that says `%2E` itself is `%252E` in its key.
        assert_ne!(webhook_id("a:%252E"), webhook_id("a:."));
    }
}
