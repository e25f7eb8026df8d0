//! Whom TLS trusts: the certificate authorities of a file, or the system's; and
//! in plain words what it did not like about a peer. Knows no protocol above
//! TLS.

use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::{CertificateError, InvalidMessage, PeerIncompatible, RootCertStore};

/// The authorities to trust could not be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to load trusted certificates from {}: {detail}", origin.display())]
pub struct Untrusting {
    /// The file, or `the system` for the system's store.
    pub origin: PathBuf,
    /// What is wrong with it.
    pub detail: String,
}

/// Those of `ca_file`, or else the system's.
///
/// # Errors
///
/// [`Untrusting`], when there is none at all, or the file cannot be read whole.
pub fn authorities(ca_file: Option<&Path>) -> Result<RootCertStore, Untrusting> {
    let mut store = RootCertStore::empty();
    let Some(path) = ca_file else {
        let system = rustls_native_certs::load_native_certs();
        // The system's store may hold some that are too odd to be read; the
        // others are of use all the same.
        let (added, _) = store.add_parsable_certificates(system.certs);
        if added > 0 {
            return Ok(store);
        }
        let detail = match system.errors.first() {
            Some(error) => error.to_string(),
            None => "there are none".to_owned(),
        };
        return Err(Untrusting {
            origin: PathBuf::from("the system"),
            detail: format!("{detail}; install ca-certificates, or set ca_file"),
        });
    };
    let failed = |detail: String| Untrusting {
        origin: path.to_owned(),
        detail,
    };
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| failed(pem(&error)))? {
        let certificate = certificate.map_err(|error| failed(pem(&error)))?;
        store
            .add(certificate)
            .map_err(|error| failed(error.to_string()))?;
    }
    if store.is_empty() {
        return Err(failed(
            "it holds no certificate; ca_file must be a PEM file with BEGIN CERTIFICATE lines"
                .to_owned(),
        ));
    }
    Ok(store)
}

/// The library's own words for an I/O error do not name its cause.
fn pem(error: &PemError) -> String {
    match error {
        PemError::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// What TLS did not like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsProblem {
    /// The certificate is not signed by an authority that is trusted here.
    UnknownIssuer,
    /// The certificate is for other host names.
    WrongHost,
    /// The certificate's time has passed, or this host's clock is wrong.
    Expired,
    /// The certificate's time has not come, or this host's clock is wrong.
    NotYetValid,
    /// The port answered with something that is not TLS.
    NotTls,
    /// Anything else; the detail says what.
    Other,
}

impl TlsProblem {
    /// Which kind `error` is.
    #[must_use]
    pub fn of(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(error) => match error {
                // A self-signed certificate, or the authority's own, presented
                // by a server: neither is vouched for by a trusted authority.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    Self::UnknownIssuer
                }
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. } => Self::WrongHost,
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    Self::Expired
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::NotYetValid
                }
                _ => Self::Other,
            },
            rustls::Error::InvalidMessage(
                InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
            )
            | rustls::Error::PeerIncompatible(
                PeerIncompatible::ServerSentHelloRetryRequestWithUnknownExtension,
            ) => Self::NotTls,
            _ => Self::Other,
        }
    }

    /// What is wrong, and the way out; `None` where only the peer's log can
    /// tell.
    #[must_use]
    pub fn hint(self) -> Option<&'static str> {
        match self {
            Self::UnknownIssuer => Some(
                "the server's certificate is not signed by a trusted authority; set ca_file to \
                 the authority's certificate",
            ),
            Self::WrongHost => Some(
                "the server's certificate is for another host name; use one it lists in the URL",
            ),
            Self::Expired => {
                Some("the server's certificate has expired, or this host's clock is wrong")
            }
            Self::NotYetValid => {
                Some("the server's certificate is not valid yet, or this host's clock is wrong")
            }
            Self::NotTls => {
                Some("the port does not speak TLS; is it the one for plain connections?")
            }
            Self::Other => None,
        }
    }
}
