//! What the system says of this process in `/proc/self`.

/// Sizes of this process. `None` where the system does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessStatus {
    /// Memory in use, in bytes.
    pub resident_bytes: Option<u64>,
    /// Address space in use, in bytes.
    pub virtual_bytes: Option<u64>,
    /// Threads.
    pub threads: Option<u64>,
    /// Open file descriptors.
    pub open_files: Option<u64>,
}

impl ProcessStatus {
    /// As it is now.
    #[must_use]
    pub fn read() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        // The folder's own descriptor is among them.
        let files = std::fs::read_dir("/proc/self/fd").map(|open| open.count().saturating_sub(1));
        Self {
            open_files: files.ok().and_then(|count| u64::try_from(count).ok()),
            ..Self::parse(&status)
        }
    }

    fn parse(status: &str) -> Self {
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let kilobytes = |name: &str| number(name)?.checked_mul(1_024);
        Self {
            resident_bytes: kilobytes("VmRSS:"),
            virtual_bytes: kilobytes("VmSize:"),
            threads: number("Threads:"),
            open_files: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_and_what_is_not_there_is_not_known() {
        let status = "Name:\tackonce\nVmSize:\t  204800 kB\nVmRSS:\t   20480 kB\nThreads:\t12\n";
        let parsed = ProcessStatus::parse(status);
        assert_eq!(parsed.resident_bytes, Some(20 << 20));
        assert_eq!(parsed.virtual_bytes, Some(200 << 20));
        assert_eq!(parsed.threads, Some(12));
        assert_eq!(ProcessStatus::parse("VmRSS:\n"), ProcessStatus::default());
    }
}
