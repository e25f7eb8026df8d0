//! The daemon's consumers: started, ended together, and replaced one by one
//! when the configuration has changed.
//!
//! A consumer whose part of the configuration has changed is drained as in a
//! stop, and started anew when it has come to an end. The others do not notice.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, Sender, bounded, never, select};

use super::runner::Runner;
use super::{Fatal, Reloads, reload};
use crate::config::{self, Config, checked};
use crate::handler::{self, rust::Makers};
use crate::observe::admin::Shown;
use crate::observe::logging;
use crate::observe::systemd::{Reload, Systemd};
use crate::prune;
use crate::stop::{self, Stop, Stopper};

/// A consumer that has come to an end.
struct Ended {
    name: String,
    result: Result<(), Fatal>,
}

/// A consumer that has not.
struct Running {
    consumer: Arc<checked::Consumer>,
    /// `None` once it was told to stop.
    stopper: Option<Stopper>,
    thread: JoinHandle<()>,
}

/// All consumers of the daemon.
pub(super) struct Fleet<'a> {
    config: Config,
    makers: &'a Makers,
    host: String,
    shown: Shown,
    systemd: Systemd,
    running: BTreeMap<String, Running>,
    pruning: Option<Stopper>,
    ended: Sender<Ended>,
    ends: Receiver<Ended>,
    /// Where the configuration that is being checked comes out.
    checking: Option<Receiver<Result<Config, String>>>,
    /// A reload has begun and not ended.
    is_reloading: bool,
}

impl<'a> Fleet<'a> {
    /// No consumer runs yet.
    pub(super) fn new(
        config: Config,
        makers: &'a Makers,
        host: String,
        shown: Shown,
        systemd: Systemd,
    ) -> Self {
        // One that has come to an end waits for its turn to be heard.
        let (ended, ends) = bounded(1);
        Self {
            config,
            makers,
            host,
            shown,
            systemd,
            running: BTreeMap::new(),
            pruning: None,
            ended,
            ends,
            checking: None,
            is_reloading: false,
        }
    }

    /// Runs every consumer until `stop`, or until one cannot go on, which stops
    /// the others.
    pub(super) fn run(mut self, stop: &Stop, reloads: &Reloads) -> Result<(), Fatal> {
        let mut result = self.start_missing();
        while result.is_ok() {
            let wishes = match self.is_reloading {
                true => &never(),
                false => &reloads.wishes,
            };
            let nothing = never();
            select! {
                recv(self.ends) -> ended => if let Ok(ended) = ended {
                    result = self.see_off(ended);
                },
                recv(self.checking.as_ref().unwrap_or(&nothing)) -> checked => {
                    self.checking = None;
                    result = self.take_over(checked.unwrap_or_else(|_| {
                        Err("the thread that looked at it panicked".to_owned())
                    }));
                }
                recv(wishes) -> wish => match wish {
                    Ok(()) => self.begin_reload(reloads),
                    // No signals any more: the process is about to end.
                    Err(_) => break,
                },
                recv(stop.as_receiver()) -> _ => break,
            }
        }
        self.stop_all(result)
    }

    /// Starts what the configuration names and does not run.
    fn start_missing(&mut self) -> Result<(), Fatal> {
        if self.pruning.is_none() {
            let (stopper, stop) = stop::pair();
            prune::start(&self.config, &self.shown.metrics, &stop)?;
            self.pruning = Some(stopper);
        }
        for consumer in self.config.consumers.clone() {
            if !self.running.contains_key(&consumer.name) {
                self.start(consumer)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, consumer: checked::Consumer) -> Result<(), Fatal> {
        let handler =
            handler::build(&consumer, self.makers).map_err(|e| Fatal::Config(e.to_string()))?;
        log::info!(
            consumer = consumer.name.as_str(), handler = handler.kind(), effect:% = handler.effect();
            "handles messages"
        );
        if let checked::Handler::Sql(sql) = &consumer.handler {
            log::info!(consumer = consumer.name.as_str(); "its script runs {}", sql.batch.how());
        }
        let (stopper, stop) = stop::pair();
        let signs = super::show(&self.shown, &self.config, &consumer, &handler);
        let (name, consumer) = (consumer.name.clone(), Arc::new(consumer));
        let runner = Runner {
            config: self.config.clone(),
            consumer: Arc::clone(&consumer),
            makers: self.makers.clone(),
            host: self.host.clone(),
            stop,
            signs,
        };
        let (ended, own_name) = (self.ended.clone(), name.clone());
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                let end = catch_unwind(AssertUnwindSafe(|| runner.run()));
                let result =
                    end.unwrap_or_else(|_| Err(anyhow!("a consumer thread panicked").into()));
                let name = own_name;
                ended.send(Ended { name, result }).ok();
            })
            .context("failed to start a consumer thread")?;
        let running = Running {
            consumer,
            stopper: Some(stopper),
            thread,
        };
        self.running.insert(name, running);
        Ok(())
    }

    /// One has come to an end: because it was told to, or for good.
    fn see_off(&mut self, ended: Ended) -> Result<(), Fatal> {
        let was_told = self.remove(&ended.name);
        ended.result?;
        if !was_told {
            return Err(anyhow!("consumer {} ended by itself", ended.name).into());
        }
        let stays = |consumer: &checked::Consumer| consumer.name == ended.name;
        if !self.config.consumers.iter().any(stays) {
            self.shown.forget(&ended.name);
        }
        self.start_missing()?;
        self.end_reload_if_through();
        Ok(())
    }

    /// Whether it had been told to stop.
    fn remove(&mut self, name: &str) -> bool {
        let Some(running) = self.running.remove(name) else {
            return false;
        };
        if running.thread.join().is_err() {
            log::error!("a consumer thread panicked");
        }
        running.stopper.is_none()
    }

    fn begin_reload(&mut self, reloads: &Reloads) {
        self.is_reloading = true;
        self.systemd.reloading();
        log::info!("told to reload: reading the configuration again");
        match reload::check(reloads, &self.config, self.makers) {
            Ok(checking) => self.checking = Some(checking),
            Err(error) => self.refuse(&format!("{error:#}")),
        }
    }

    fn refuse(&mut self, why: &str) {
        log::error!("reload refused, going on with the configuration as it was: {why}");
        self.end_reload(Reload::Refused);
    }

    /// Goes over to the new configuration.
    fn take_over(&mut self, checked: Result<Config, String>) -> Result<(), Fatal> {
        let new = match checked {
            Ok(new) => new,
            Err(why) => {
                self.refuse(&why);
                return Ok(());
            }
        };
        let changes = config::changes(&self.config, &new);
        match changes.is_empty() {
            true => log::info!("reloaded: nothing has changed"),
            false => log::info!(changes = changes.len(); "reloaded: {}", changes.join("; ")),
        }
        let old = std::mem::replace(&mut self.config, new);
        let new = &self.config;
        if old.admin != new.admin {
            log::warn!("what has changed in [admin] takes effect when the daemon is restarted");
        }
        logging::set_format(new.log_format);
        if old.postgres != new.postgres || old.ledger != new.ledger {
            self.pruning = None;
        }
        for (name, running) in &mut self.running {
            let stays = new.consumers.iter().find(|consumer| consumer.name == *name);
            let is_same = stays.is_some_and(|consumer| *consumer == *running.consumer);
            if !(is_same && reload::have_common_ground(&old, new)) {
                log::info!(consumer = name.as_str(); "draining, because its configuration has changed");
                running.stopper = None;
            }
        }
        self.start_missing()?;
        self.end_reload_if_through();
        Ok(())
    }

    fn end_reload_if_through(&mut self) {
        let is_draining = self.running.values().any(|r| r.stopper.is_none());
        if self.is_reloading && self.checking.is_none() && !is_draining {
            self.end_reload(Reload::Done);
        }
    }

    fn end_reload(&mut self, end: Reload) {
        self.is_reloading = false;
        self.systemd.reloaded(end);
    }

    fn stop_all(mut self, mut result: Result<(), Fatal>) -> Result<(), Fatal> {
        log::info!("stopping");
        self.systemd.stopping(self.config.daemon.shutdown_timeout);
        self.pruning = None;
        for running in self.running.values_mut() {
            running.stopper = None;
        }
        while !self.running.is_empty() {
            let Ok(ended) = self.ends.recv() else {
                break;
            };
            self.remove(&ended.name);
            result = result.and(ended.result);
        }
        log::info!("stopped");
        result
    }
}
