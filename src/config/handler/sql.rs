//! `type = "sql"`.

use crate::config::checked::{BatchMode, SqlHandler};
use crate::config::error::Complaint;
use crate::config::reader::Section;
use crate::config::{defaults, files, keys};

/// What it knows.
pub(super) const KEYS: &[&str] = &["file", "sql", "batch"];

/// `None` where something is wrong, which is reported.
pub(super) fn handler(section: &Section<'_>) -> Option<SqlHandler> {
    let (has_file, has_sql) = (section.has("file"), section.has("sql"));
    if has_file && has_sql {
        section.reader.report(
            section.span_of("sql"),
            "both `file` and `sql` in [consumer.handler]",
            "keep one of them",
        );
        return None;
    }
    let batch = section
        .text("batch")
        .then(|text| keys::one_of(&text, &BatchMode::ALL, BatchMode::as_str))
        .or(BatchMode::Each)
        .value;
    let handler = if has_file {
        section
            .text("file")
            .then(|path| read_handler(section, &path, batch))
    } else {
        section.text("sql").then(|text| {
            check_sql(&text)?;
            Ok(SqlHandler {
                text,
                origin: INLINE.to_owned(),
                batch,
            })
        })
    };
    if !has_file && !has_sql {
        section.report_missing("file", "add `file` with the path of a .sql file, or `sql`");
        return None;
    }
    handler.optional().map(|field| field.value)
}

/// The origin of statements that stand in the configuration itself. No path
/// looks like it: those are absolute.
pub(in crate::config) const INLINE: &str = "inline";

fn read_handler(
    section: &Section<'_>,
    path: &str,
    batch: BatchMode,
) -> Result<SqlHandler, Complaint> {
    let path = files::resolve(section.reader.folder, path);
    let text = files::read_text(&path, defaults::HANDLER_FILE_MAX)
        .map_err(|unreadable| unreadable.complaint(&path))?;
    let origin = path.display().to_string();
    check_sql(&text).map_err(|complaint| Complaint {
        message: format!("{}: {origin}", complaint.message),
        hint: complaint.hint,
    })?;
    Ok(SqlHandler {
        text,
        origin,
        batch,
    })
}

fn check_sql(text: &str) -> Result<(), Complaint> {
    if text.trim().is_empty() {
        return Err(Complaint::new(
            "holds no statement",
            "write the statements that apply the relation `message`",
        ));
    }
    if text.contains('\0') {
        return Err(Complaint::new(
            "holds a NUL character",
            "PostgreSQL text cannot hold one: is it a .sql file?",
        ));
    }
    Ok(())
}
