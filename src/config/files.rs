//! Reading the few files that a configuration consists of, each with a bound.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::Complaint;

/// Why a file gives no text.
pub(super) enum Unreadable {
    /// The system says no.
    Io(std::io::Error),
    /// Longer than the limit, in bytes.
    TooLong(usize),
    /// Not UTF-8 from this byte on; what comes before it is text.
    NotUtf8(String),
}

impl Unreadable {
    /// The complaint about a value that names `path`.
    pub(super) fn complaint(&self, path: &Path) -> Complaint {
        let path = path.display();
        match self {
            Self::Io(cause) => Complaint::new(
                format!("cannot be read from {path}: {cause}"),
                "relative paths start at the configuration file's folder; the daemon's user needs \
                 to be allowed to read the file",
            ),
            Self::TooLong(limit) => Complaint::new(
                format!("cannot be read from {path}: longer than {limit} bytes"),
                "name the right file",
            ),
            Self::NotUtf8(valid) => Complaint::new(
                format!(
                    "cannot be read from {path}: not UTF-8 at byte {}",
                    valid.len() + 1
                ),
                "save the file as UTF-8",
            ),
        }
    }
}

/// What editors put before UTF-8 to say that it is UTF-8. It is no part of a
/// text, and PostgreSQL, URLs and HTTP take it for one.
const BOM: &[u8] = b"\xEF\xBB\xBF";

/// `bytes` of the beginning of a text without the mark before it.
#[must_use]
pub fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BOM).unwrap_or(bytes)
}

/// The whole text of `path`, if it has at most `limit` bytes, without a mark
/// that says that it is UTF-8.
pub(super) fn read_text(path: &Path, limit: usize) -> Result<String, Unreadable> {
    let file = std::fs::File::open(path).map_err(Unreadable::Io)?;
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(Unreadable::Io)?;
    if bytes.len() > limit {
        return Err(Unreadable::TooLong(limit));
    }
    if without_bom(&bytes).len() < bytes.len() {
        bytes.drain(..BOM.len());
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        Unreadable::NotUtf8(String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned())
    })
}

/// Whether everybody on this machine can read or write `path`.
pub(super) fn is_open_to_others(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;

    let metadata = std::fs::metadata(path);
    metadata.is_ok_and(|file| file.permissions().mode() & 0o006 != 0)
}

/// Which files some paths lead to, and in which state: another one when a file
/// was written to, replaced, or cannot be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp(Vec<Option<[i64; 4]>>);

/// The stamp of `paths` as they are now. Reads no file.
#[must_use]
pub fn stamp<'p>(paths: impl IntoIterator<Item = &'p Path>) -> Stamp {
    let state = |path: &Path| {
        let file = std::fs::metadata(path).ok()?;
        // The inode tells one that was moved into place from the one before.
        let inode = file.ino().cast_signed();
        let size = file.size().cast_signed();
        Some([inode, size, file.mtime(), file.mtime_nsec()])
    };
    Stamp(paths.into_iter().map(state).collect())
}

/// `path` as seen from `folder`, made absolute so that it names the same file
/// wherever the configuration is printed to.
pub(super) fn resolve(folder: &Path, path: &str) -> PathBuf {
    let joined = folder.join(path);
    std::path::absolute(&joined).unwrap_or(joined)
}

/// Whether standard error is the journal's own socket, by what systemd says of
/// it in `$JOURNAL_STREAM`: its device and inode.
pub(super) fn stderr_is(journal_stream: &str) -> bool {
    let own = std::fs::metadata("/proc/self/fd/2");
    own.is_ok_and(|own| journal_stream == format!("{}:{}", own.dev(), own.ino()))
}
