//! Whom TLS trusts: the certificate authorities of a file, or the system's; and
//! in plain words what it did not like about a peer. Knows no protocol above
//! TLS.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, InvalidMessage,
    PeerIncompatible, RootCertStore,
};

use crate::config::checked::{ClientCertificate, Tls};
use crate::config::{Stamp, stamp};

/// Whom to trust, or who we are, could not be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to load {what} from {}: {detail}", origin.display())]
pub struct Untrusting {
    /// What was to be loaded.
    pub what: &'static str,
    /// The file, or `the system` for the system's store.
    pub origin: PathBuf,
    /// What is wrong with it.
    pub detail: String,
}

const AUTHORITIES: &str = "trusted certificates";
const CERTIFICATE: &str = "the client certificate";
const KEY: &str = "the client certificate's key";

/// Why there can be no TLS at all.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A file is of no use.
    #[error(transparent)]
    Files(#[from] Untrusting),
    /// The TLS library cannot do what is asked of it.
    #[error("failed to set up TLS: {0}")]
    Library(#[from] rustls::Error),
}

/// TLS as `tls` has it: TLS 1.2 or 1.3, the peer always verified.
///
/// # Errors
///
/// [`SetupError`].
pub fn client(tls: &Tls) -> Result<ClientConfig, SetupError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(authorities(tls.ca_file.as_deref())?);
    let Some(files) = &tls.client else {
        return Ok(config.with_no_client_auth());
    };
    let (chain, key) = identity(files)?;
    let config = config.with_client_auth_cert(chain, key).map_err(|error| {
        let key_file = files.key_file.display();
        Untrusting {
            what: CERTIFICATE,
            origin: files.cert_file.clone(),
            detail: format!("{error}; does it belong to the key in {key_file}?"),
        }
    })?;
    Ok(config)
}

/// TLS as files have it, for those who connect often: they are read when this
/// is made, and again when one of them has changed.
#[derive(Debug)]
pub struct Renewed {
    tls: Tls,
    loaded: Mutex<(Stamp, Arc<ClientConfig>)>,
}

impl Renewed {
    /// Reads the files of `tls`.
    ///
    /// # Errors
    ///
    /// [`SetupError`], as [`client`].
    pub fn new(tls: &Tls) -> Result<Self, SetupError> {
        // Looked at first: what changes while it is read is read once more.
        let seen = stamp(paths(tls));
        let config = Arc::new(client(tls)?);
        Ok(Self {
            tls: tls.clone(),
            loaded: Mutex::new((seen, config)),
        })
    }

    /// TLS as the files have it now. The system's authorities stay those that
    /// were there when this was made.
    ///
    /// # Errors
    ///
    /// [`SetupError`], when they changed and are of no use: for as long as
    /// they are not.
    pub fn client(&self) -> Result<Arc<ClientConfig>, SetupError> {
        let seen = stamp(paths(&self.tls));
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.0 != seen {
            *loaded = (seen, Arc::new(client(&self.tls)?));
        }
        Ok(Arc::clone(&loaded.1))
    }
}

/// The files that `tls` names.
fn paths(tls: &Tls) -> impl Iterator<Item = &Path> {
    let client = tls.client.iter();
    let client = client.flat_map(|files| [files.cert_file.as_path(), files.key_file.as_path()]);
    tls.ca_file.as_deref().into_iter().chain(client)
}

/// Whether the files that `tls` names, if any, are of use.
///
/// # Errors
///
/// [`SetupError`], as [`client`].
pub fn check_files(tls: &Tls) -> Result<(), SetupError> {
    if *tls == Tls::default() {
        return Ok(());
    }
    client(tls).map(drop)
}

/// The files of a [`Tls`] in PEM, for libraries that want them so. That they
/// are of use was checked.
#[derive(Default)]
pub struct Pem {
    /// The authorities of `ca_file`; `None`: the system's.
    pub authorities: Option<Vec<u8>>,
    /// The client's certificate and its key.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

/// Loads the files of `tls`.
///
/// # Errors
///
/// [`SetupError`], as [`client`].
pub fn pem(tls: &Tls) -> Result<Pem, SetupError> {
    client(tls)?;
    let encode = |label, parts: &[&[u8]]| {
        let texts: String = parts.iter().map(|der| to_pem(label, der)).collect();
        texts.into_bytes()
    };
    let certificates = |chain: &[CertificateDer<'_>]| {
        let parts: Vec<&[u8]> = chain.iter().map(AsRef::as_ref).collect();
        encode("CERTIFICATE", &parts)
    };
    let mut found = Pem::default();
    if let Some(path) = &tls.ca_file {
        found.authorities = Some(certificates(&load(path, AUTHORITIES)?));
    }
    if let Some(files) = &tls.client {
        let (chain, key) = identity(files)?;
        let label = match &key {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        found.client = Some((certificates(&chain), encode(label, &[key.secret_der()])));
    }
    Ok(found)
}

fn to_pem(label: &str, der: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        // Writing to a String cannot fail, and base64 is ASCII.
        let _ = writeln!(pem, "{}", String::from_utf8_lossy(line));
    }
    let _ = writeln!(pem, "-----END {label}-----");
    pem
}

fn identity(
    files: &ClientCertificate,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Untrusting> {
    let chain = load(&files.cert_file, CERTIFICATE)?;
    let key = PrivateKeyDer::from_pem_file(&files.key_file).map_err(|error| Untrusting {
        what: KEY,
        origin: files.key_file.clone(),
        detail: match error {
            PemError::NoItemsFound => "it holds no private key without a pass phrase".to_owned(),
            error => pem_text(&error),
        },
    })?;
    Ok((chain, key))
}

/// The certificates of one file, at least one.
fn load(path: &Path, what: &'static str) -> Result<Vec<CertificateDer<'static>>, Untrusting> {
    let failed = |detail: String| Untrusting {
        what,
        origin: path.to_owned(),
        detail,
    };
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| failed(pem_text(&error)))?;
    if found.is_empty() {
        return Err(failed(
            "it holds no certificate; it must be a PEM file with BEGIN CERTIFICATE lines"
                .to_owned(),
        ));
    }
    Ok(found)
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
            what: AUTHORITIES,
            origin: PathBuf::from("the system"),
            detail: format!("{detail}; install ca-certificates, or set ca_file"),
        });
    };
    for certificate in load(path, AUTHORITIES)? {
        store.add(certificate).map_err(|error| Untrusting {
            what: AUTHORITIES,
            origin: path.to_owned(),
            detail: error.to_string(),
        })?;
    }
    Ok(store)
}

/// The library's own words for an I/O error do not name its cause.
fn pem_text(error: &PemError) -> String {
    match error {
        PemError::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// Whether `error` says that the other side takes no more.
#[must_use]
pub fn has_hung_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
    )
}

/// Why the other side of `socket` hung up in the middle of a handshake, if it
/// said so before: what it said waits to be read.
#[must_use]
pub fn last_word(tls: &mut ClientConnection, socket: &mut impl Read) -> Option<rustls::Error> {
    while tls.read_tls(socket).ok()? > 0 {
        if let Err(error) = tls.process_new_packets() {
            return Some(error);
        }
    }
    None
}

/// What TLS said, if that is what `error` comes from.
#[must_use]
pub fn tls_error<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e rustls::Error> {
    type Shared = Arc<dyn Error + Send + Sync>;

    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // Neither of these names what it wraps as its source.
        next = if let Some(shared) = error.downcast_ref::<Shared>() {
            Some(&**shared)
        } else {
            match error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref)
            {
                Some(inner) => Some(inner),
                None => error.source(),
            }
        };
    }
    None
}

/// What TLS said, with the way out where there is one.
#[must_use]
pub fn explained(error: &rustls::Error) -> String {
    match TlsProblem::of(error).hint() {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
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
    /// The peer wants a certificate of ours, or another one.
    ClientRefused,
    /// The peer ends the handshake and does not say why. In TLS 1.2 that is how
    /// most ask for a certificate that did not come.
    Unwanted,
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
            rustls::Error::AlertReceived(
                AlertDescription::CertificateRequired
                | AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied,
            ) => Self::ClientRefused,
            rustls::Error::AlertReceived(AlertDescription::HandshakeFailure) => Self::Unwanted,
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
            Self::ClientRefused => Some(
                "the server wants a client certificate that it trusts; set client_cert_file and \
                 client_key_file, and see the server's log",
            ),
            Self::Unwanted => Some(
                "the server ended the handshake: it wants a client certificate, for which set \
                 client_cert_file and client_key_file, or knows no cipher of ours; see its log",
            ),
            Self::Other => None,
        }
    }
}
