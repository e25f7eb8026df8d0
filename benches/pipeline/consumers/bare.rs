//! amiquip alone: what a consumer without any promise reaches.

use amiquip::ConsumerOptions;
use anyhow::Result;

use super::{Arguments, Stop};
use crate::amqp;

/// Acks every delivery; with `together_max` above 1, up to so many that are
/// waiting with one ack.
pub(super) fn run(arguments: &Arguments, stop: &Stop, together_max: usize) -> Result<()> {
    let mut connection = amqp::connect(&arguments.amqp)?;
    let channel = connection.open_channel(None)?;
    channel.qos(0, arguments.prefetch, false)?;
    let consumer = channel.basic_consume(arguments.queue.as_str(), ConsumerOptions::default())?;
    while let Some(mut last) = super::next(consumer.receiver(), stop)? {
        if together_max == 1 {
            last.ack(&channel)?;
            continue;
        }
        for message in consumer.receiver().try_iter().take(together_max - 1) {
            last = super::delivery(message)?;
        }
        last.ack_multiple(&channel)?;
    }
    super::cancel(consumer)?;
    // The channel is dropped behind it.
    connection.close()?;
    Ok(())
}
