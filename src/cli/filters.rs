//! The options that pick dead letters, for every command at the desk.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;

use super::Exit;
use crate::config::without_bom;
use crate::dead_letter::filter::Filter;
use crate::dead_letter::time;
use crate::message::MESSAGE_ID_MAX_BYTES;

/// Most ids of one command.
const IDS_MAX: usize = 1_000_000;

/// What the help says about them, below.
pub const HELP: &str = "\
Filters: a letter is meant when all that is given applies to it; of several --reason, --id or \
--routing-key, one must. Without any, all letters are meant. A letter without a usable id is \
called sha256: and the first digits of its body's SHA-256, 8 at least. Times are when it died: by \
the failure journal, else by the broker; a letter of which that is not known is in no span of time.";

/// Which letters.
#[derive(Debug, Clone, Args, Default)]
#[command(next_help_heading = "Which letters")]
pub struct FilterArguments {
    /// Dead for this reason, such as max-attempts; may be repeated
    #[arg(long, value_name = "REASON")]
    pub reason: Vec<String>,

    /// Died at this time in UTC or later, or less than so long ago
    #[arg(long, value_name = "TIME|DURATION")]
    pub since: Option<String>,

    /// Died before this time in UTC, or longer than so ago
    #[arg(long, value_name = "TIME|DURATION")]
    pub until: Option<String>,

    /// With this id; may be repeated
    #[arg(long, value_name = "ID")]
    pub id: Vec<String>,

    /// With one of the ids in FILE, one a line; `-` for standard input
    #[arg(long, value_name = "FILE")]
    pub ids_file: Option<PathBuf>,

    /// With this value in its JSON body, such as /customer/country=DE; may be
    /// repeated
    #[arg(long = "where", value_name = "/POINTER=VALUE")]
    pub places: Vec<String>,

    /// First published with this routing key, * and # as in a topic exchange;
    /// may be repeated
    #[arg(long, value_name = "KEY")]
    pub routing_key: Vec<String>,

    /// With this header; may be repeated
    #[arg(long = "header", value_name = "NAME=VALUE")]
    pub headers: Vec<String>,
}

impl FilterArguments {
    /// The filter they make.
    ///
    /// # Errors
    ///
    /// [`Exit::Usage`], after it was said what is wrong.
    pub fn filter(&self) -> Result<Filter, Exit> {
        self.read().map_err(|(option, error)| {
            eprintln!("ackonce: {option}: {error}");
            Exit::Usage
        })
    }

    fn read(&self) -> Result<Filter, (&'static str, String)> {
        let mut filter = Filter::default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| i64::try_from(now.as_micros()).unwrap_or(i64::MAX));
        for reason in &self.reason {
            filter.reason(reason).map_err(|e| ("--reason", e))?;
        }
        if let Some(text) = &self.since {
            filter.since(time::read(text, now).map_err(|e| ("--since", e))?);
        }
        if let Some(text) = &self.until {
            filter.until(time::read(text, now).map_err(|e| ("--until", e))?);
        }
        for id in &self.id {
            filter.id(id).map_err(|e| ("--id", e))?;
        }
        if let Some(path) = &self.ids_file {
            read_ids(path, &mut filter).map_err(|e| ("--ids-file", e))?;
        }
        for place in &self.places {
            filter.place(place).map_err(|e| ("--where", e))?;
        }
        for key in &self.routing_key {
            filter.routing_key(key);
        }
        for header in &self.headers {
            filter.header(header).map_err(|e| ("--header", e))?;
        }
        Ok(filter)
    }

    /// As typed, for the journal.
    #[must_use]
    pub fn typed(&self) -> String {
        let mut parts: Vec<String> = Vec::new();
        let mut put = |option: &str, value: &str| parts.push(format!("{option} {value:?}"));
        for (option, values) in [
            ("--reason", &self.reason),
            ("--id", &self.id),
            ("--where", &self.places),
            ("--routing-key", &self.routing_key),
            ("--header", &self.headers),
        ] {
            for value in values {
                put(option, value);
            }
        }
        for (option, value) in [("--since", &self.since), ("--until", &self.until)] {
            if let Some(value) = value {
                put(option, value);
            }
        }
        if let Some(path) = &self.ids_file {
            put("--ids-file", &path.display().to_string());
        }
        match parts.is_empty() {
            true => "--all".to_owned(),
            false => parts.join(" "),
        }
    }
}

fn read_ids(path: &Path, filter: &mut Filter) -> Result<(), String> {
    let input: Box<dyn BufRead> = match path.as_os_str() == "-" {
        true => Box::new(BufReader::new(io::stdin())),
        false => {
            let opened = File::open(path);
            let file = opened.map_err(|e| format!("failed to open {}: {e}", path.display()))?;
            Box::new(BufReader::new(file))
        }
    };
    filter.by_id();
    add_ids(input, filter)
}

/// A line is an id as it stands; empty lines are none.
fn add_ids(mut input: impl BufRead, filter: &mut Filter) -> Result<(), String> {
    for number in 1.. {
        let mut line = Vec::new();
        let most = MESSAGE_ID_MAX_BYTES as u64 + 2;
        let read = Read::take(&mut input, most).read_until(b'\n', &mut line);
        let failed = |error: &dyn std::fmt::Display| format!("line {number}: {error}");
        if read.map_err(|error| failed(&error))? == 0 {
            break;
        }
        let text = without_bom(&line);
        let line = std::str::from_utf8(text).map_err(|_| failed(&"it is not UTF-8"))?;
        let id = line.strip_suffix('\n').unwrap_or(line);
        let id = id.strip_suffix('\r').unwrap_or(id);
        if !id.is_empty() {
            filter.id(id).map_err(|error| failed(&error))?;
        }
        if filter.ids() > IDS_MAX {
            return Err(format!("it has more than {IDS_MAX} ids"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_lines_and_a_bad_one_is_named_by_its_number() {
        let mut filter = Filter::default();
        assert_eq!(add_ids(&b"a\n\nb c\r\nd"[..], &mut filter), Ok(()));
        assert_eq!(filter.ids(), 3);
        let long = format!("a\n{}\n", "x".repeat(300));
        let error = add_ids(long.as_bytes(), &mut filter).unwrap_err();
        assert!(error.starts_with("line 2: "), "{error}");
        let error = add_ids(&b"a\n\xff\n"[..], &mut filter).unwrap_err();
        assert_eq!(error, "line 2: it is not UTF-8");
    }

    #[test]
    fn an_empty_list_of_ids_means_no_letter_and_not_all() {
        let mut filter = Filter::default();
        filter.by_id();
        assert!(!filter.is_empty());
        assert!(filter.is_by_id_only());
    }
}
