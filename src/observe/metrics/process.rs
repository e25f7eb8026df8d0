//! What the system says of this process, under the names that Prometheus's own
//! client libraries use.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeVal;
use prometheus::{Counter, Error, Gauge, IntCounter, Opts, Registry};

use crate::config::ProcessStatus;
use crate::observe::logging;

/// The process's series. What the system does not tell stays at 0.
pub(super) struct Process {
    cpu: Counter,
    resident: Gauge,
    virtual_size: Gauge,
    threads: Gauge,
    open_files: Gauge,
    max_files: Gauge,
    dropped_lines: IntCounter,
}

impl Process {
    pub(super) fn register(registry: &Registry) -> Result<Self, Error> {
        let gauge = |name: &str, help: &str| -> Result<Gauge, Error> {
            let gauge = Gauge::with_opts(Opts::new(format!("process_{name}"), help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let cpu = Counter::with_opts(Opts::new(
            "process_cpu_seconds_total",
            "Processor time used, by the program and by the system for it.",
        ))?;
        registry.register(Box::new(cpu.clone()))?;
        let dropped_lines = IntCounter::with_opts(Opts::new(
            "ackonce_log_lines_dropped_total",
            "Lines of the log that standard error did not take.",
        ))?;
        registry.register(Box::new(dropped_lines.clone()))?;
        let started = gauge(
            "start_time_seconds",
            "When the metrics began, in seconds since 1970.",
        )?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        started.set(now.map_or(0.0, |now| now.as_secs_f64()));
        Ok(Self {
            cpu,
            resident: gauge("resident_memory_bytes", "Memory in use.")?,
            virtual_size: gauge("virtual_memory_bytes", "Address space in use.")?,
            threads: gauge("threads", "Threads.")?,
            open_files: gauge("open_fds", "Open file descriptors.")?,
            max_files: gauge("max_fds", "Most file descriptors that may be open.")?,
            dropped_lines,
        })
    }

    /// Asks the system.
    pub(super) fn look(&self) {
        let status = ProcessStatus::read();
        let known = [
            (&self.resident, status.resident_bytes),
            (&self.virtual_size, status.virtual_bytes),
            (&self.threads, status.threads),
            (&self.open_files, status.open_files),
            (&self.max_files, max_files()),
        ];
        for (gauge, value) in known {
            if let Some(value) = value {
                gauge.set(float(value));
            }
        }
        let dropped = logging::dropped();
        self.dropped_lines
            .inc_by(dropped.saturating_sub(self.dropped_lines.get()));
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let used = seconds(usage.user_time()) + seconds(usage.system_time());
            self.cpu.inc_by((used - self.cpu.get()).max(0.0));
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "it takes 285 years")]
fn seconds(time: TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
}

fn max_files() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE)
        .ok()
        .map(|(soft, _)| soft)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "53 bits are enough for all of these"
)]
fn float(value: u64) -> f64 {
    value as f64
}
