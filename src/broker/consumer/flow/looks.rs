//! What is found out about the queues only while messages come.

use std::time::{Duration, Instant};

use super::{CALL_WITHIN, End, Feed, Flow};
use crate::broker::cause::Cause;
use crate::broker::topology::{self, TopologyError};
use crate::message::Settlement;

/// How long a probe has to come back from a retry queue before it is looked
/// whether it still can.
pub(super) const PROBES_WITHIN: Duration = Duration::from_secs(5);

/// Looks in a row that find no reason why a probe has not come back. Between
/// two of them others were sent, which nothing that was in the way at the first
/// look can have held up.
const LOOKS: u32 = 2;

impl Flow<'_> {
    /// A probe that did not come back, where nothing can hold it up any more,
    /// says that its retry queue does not lead here: the work queue is empty,
    /// nobody else takes from it, and nothing waits in the retry queue.
    pub(super) fn look_for_probes(&mut self, feed: &Feed<'_>) -> Result<(), End> {
        let now = Instant::now();
        let Some(retry) = self.ways_back.unproved().next() else {
            return Ok(());
        };
        if now < self.look_for_probes {
            return Ok(());
        }
        self.look_for_probes = now + PROBES_WITHIN;
        let queue = &feed.consumer.topology.queue;
        let _watch = self.link.watch(CALL_WITHIN);
        let depth = |name: &str| {
            let found = self.channel.queue_declare_passive(name);
            let found = found.map_err(|error| self.lost("failed to look at a queue", &error))?;
            let count = |count: Option<u32>| count.unwrap_or_default();
            Ok((
                count(found.declared_message_count()),
                count(found.declared_consumer_count()),
            ))
        };
        let is_all = self.window.outstanding() < usize::from(feed.consumer.prefetch);
        let was_probed = self.ways_back.probed_for(retry) >= Some(PROBES_WITHIN);
        let is_empty = depth(queue)? <= (0, 1) && depth(retry)?.0 == 0;
        self.looks = match is_all && was_probed && is_empty {
            true => self.looks + 1,
            false => 0,
        };
        if self.looks >= LOOKS {
            return Err(End::Unfit(TopologyError::NoWayBack {
                retry: retry.to_owned(),
                queue: queue.clone(),
                within: PROBES_WITHIN * LOOKS,
            }));
        }
        log::warn!(
            consumer = feed.consumer.name.as_str(), queue = retry;
            "it is not proved yet that what expires in the retry queue comes back: no probe has; \
             messages that are to wait there stay unacknowledged, or wait in a shorter one"
        );
        Ok(())
    }

    /// A stream says where each message stands. So could a publisher, and a
    /// stream alone hands nothing out one by one: the broker closes the
    /// connection over that.
    pub(super) fn refuse_stream(
        &mut self,
        delivery: &amiquip::Delivery,
        feed: &Feed<'_>,
    ) -> Result<(), End> {
        let headers = delivery.properties.headers().as_ref();
        let looks_so = headers.is_some_and(|headers| headers.contains_key(topology::STREAM_HEADER));
        if self.is_no_stream || !looks_so {
            return Ok(());
        }
        let queue = feed.consumer.topology.queue.as_str();
        let _watch = self.link.watch(CALL_WITHIN);
        match self.channel.basic_get(queue, false) {
            Ok(got) => {
                self.is_no_stream = true;
                if let Some(got) = got {
                    let tag = got.delivery.delivery_tag();
                    self.window.put(tag, Box::new(got.delivery));
                    self.conclude(tag, Settlement::Requeue)?;
                }
                Ok(())
            }
            Err(error) if Cause::of(&error).to_string().contains("NOT_IMPLEMENTED") => {
                Err(End::Unfit(topology::stream_error(queue)))
            }
            Err(error) => Err(self.lost("failed to look at the queue", &error)),
        }
    }
}
