//! Certificates made on the spot by the `openssl` program.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};
use tempfile::TempDir;

/// A certificate authority of one test.
pub struct Authority {
    folder: TempDir,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        openssl(
            folder.path(),
            &[
                "req",
                "-x509",
                "-nodes",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-subj",
                &format!("/CN=authority {name}"),
                "-days",
                "2",
                "-keyout",
                "ca.key",
                "-out",
                "ca.pem",
            ],
        );
        Self { folder }
    }

    /// What a client is to trust.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// From now on [`Self::file`] is that of `other`, at the same place.
    pub fn replace(&self, other: &Self) {
        std::fs::copy(other.file(), self.file()).unwrap();
    }

    /// A server configuration for `names`, valid for `days` from now; negative
    /// days have passed.
    pub fn issue(&self, names: &str, days: i32) -> ServerConfig {
        self.configure(&self.issue_files(names, days), rustls::ALL_VERSIONS, None)
    }

    /// As [`Self::issue`], for a server of this `version` of TLS that lets
    /// nobody in without a certificate of `clients`.
    pub fn issue_asking(
        &self,
        names: &str,
        clients: &Self,
        version: &'static SupportedProtocolVersion,
    ) -> ServerConfig {
        self.configure(&self.issue_files(names, 1), &[version], Some(clients))
    }

    fn configure(
        &self,
        leaf: &Leaf,
        versions: &[&'static SupportedProtocolVersion],
        clients: Option<&Self>,
    ) -> ServerConfig {
        let certificate = CertificateDer::from_pem_file(leaf.cert()).unwrap();
        let key = PrivateKeyDer::from_pem_file(leaf.key()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .unwrap();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(clients) => {
                let mut roots = RootCertStore::empty();
                let root = CertificateDer::from_pem_file(clients.file()).unwrap();
                roots.add(root).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        builder.with_single_cert(vec![certificate], key).unwrap()
    }

    /// A certificate for `names` and its key, valid as with [`Self::issue`].
    pub fn issue_files(&self, names: &str, days: i32) -> Leaf {
        let folder = tempfile::tempdir().unwrap();
        let ca = |name: &str| self.folder.path().join(name).display().to_string();
        std::fs::write(
            folder.path().join("names"),
            format!("subjectAltName={names}\n"),
        )
        .unwrap();
        openssl(
            folder.path(),
            &[
                "req",
                "-new",
                "-nodes",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-subj",
                "/CN=server",
                "-keyout",
                "key.pem",
                "-out",
                "request.pem",
            ],
        );
        openssl(
            folder.path(),
            &[
                "x509",
                "-req",
                "-in",
                "request.pem",
                "-CA",
                &ca("ca.pem"),
                "-CAkey",
                &ca("ca.key"),
                "-set_serial",
                "1",
                "-days",
                &days.to_string(),
                "-extfile",
                "names",
                "-out",
                "cert.pem",
            ],
        );
        Leaf { folder }
    }
}

/// A certificate and its key, in files.
pub struct Leaf {
    folder: TempDir,
}

impl Leaf {
    /// The certificate, in PEM.
    pub fn cert(&self) -> PathBuf {
        self.folder.path().join("cert.pem")
    }

    /// Its key, in PEM.
    pub fn key(&self) -> PathBuf {
        self.folder.path().join("key.pem")
    }

    /// From now on they are those of `other`, at the same place: the
    /// certificate first, as most tools write them.
    pub fn replace(&self, other: &Self) {
        std::fs::copy(other.cert(), self.cert()).unwrap();
        std::fs::copy(other.key(), self.key()).unwrap();
    }
}

fn openssl(folder: &Path, arguments: &[&str]) {
    let done = Command::new("openssl")
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(done.status.success(), "openssl {arguments:?}: {done:?}");
}
