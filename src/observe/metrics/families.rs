//! Families of series, and what one consumer has of them.

use prometheus::{
    Error, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

use super::labels::Label;

/// Makes families and registers them.
pub(super) struct Families<'a>(pub(super) &'a Registry);

/// A counter for each consumer.
pub(super) struct Counters(IntCounterVec);

/// A gauge for each consumer.
pub(super) struct Gauges(IntGaugeVec);

/// A histogram for each consumer.
pub(super) struct Histograms(HistogramVec);

/// A counter for each consumer and each value of one more label.
pub(super) struct CountersBy<const N: usize> {
    family: IntCounterVec,
    values: [&'static str; N],
}

/// A gauge for each consumer and each value of one more label.
pub(super) struct GaugesBy<const N: usize> {
    family: IntGaugeVec,
    values: [&'static str; N],
}

impl Families<'_> {
    pub(super) fn counter(&self, name: &str, help: &str) -> Result<Counters, Error> {
        self.counter_vec(name, help, &["consumer"]).map(Counters)
    }

    pub(super) fn counter_by<const N: usize, L: Label<N>>(
        &self,
        label: &str,
        name: &str,
        help: &str,
    ) -> Result<CountersBy<N>, Error> {
        Ok(CountersBy {
            family: self.counter_vec(name, help, &["consumer", label])?,
            values: L::names(),
        })
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> Result<Gauges, Error> {
        self.gauge_vec(name, help, &["consumer"]).map(Gauges)
    }

    pub(super) fn gauge_by<const N: usize, L: Label<N>>(
        &self,
        label: &str,
        name: &str,
        help: &str,
    ) -> Result<GaugesBy<N>, Error> {
        Ok(GaugesBy {
            family: self.gauge_vec(name, help, &["consumer", label])?,
            values: L::names(),
        })
    }

    pub(super) fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histograms, Error> {
        let options = HistogramOpts::new(full(name), help).buckets(buckets.to_vec());
        let family = HistogramVec::new(options, &["consumer"])?;
        self.0.register(Box::new(family.clone()))?;
        Ok(Histograms(family))
    }

    pub(super) fn counter_vec(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, Error> {
        let family = IntCounterVec::new(Opts::new(full(name), help), labels)?;
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }

    pub(super) fn gauge_vec(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntGaugeVec, Error> {
        let family = IntGaugeVec::new(Opts::new(full(name), help), labels)?;
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }
}

/// The name of a family in full.
pub(super) fn full(name: &str) -> String {
    format!("ackonce_{name}")
}

// A series that is not there is as good as one that is removed: that is all
// that the results of `remove_label_values` could say.

impl Counters {
    pub(super) fn of(&self, consumer: &str) -> IntCounter {
        self.0.with_label_values(&[consumer])
    }

    pub(super) fn forget(&self, consumer: &str) {
        self.0.remove_label_values(&[consumer]).ok();
    }
}

impl Gauges {
    pub(super) fn of(&self, consumer: &str) -> IntGauge {
        self.0.with_label_values(&[consumer])
    }

    pub(super) fn forget(&self, consumer: &str) {
        self.0.remove_label_values(&[consumer]).ok();
    }
}

impl Histograms {
    pub(super) fn of(&self, consumer: &str) -> Histogram {
        self.0.with_label_values(&[consumer])
    }

    pub(super) fn forget(&self, consumer: &str) {
        self.0.remove_label_values(&[consumer]).ok();
    }
}

impl<const N: usize> CountersBy<N> {
    pub(super) fn of(&self, consumer: &str) -> [IntCounter; N] {
        self.values
            .map(|value| self.family.with_label_values(&[consumer, value]))
    }

    pub(super) fn remove(&self, consumer: &str, value: &str) {
        self.family.remove_label_values(&[consumer, value]).ok();
    }

    pub(super) fn forget(&self, consumer: &str) {
        for value in self.values {
            self.remove(consumer, value);
        }
    }
}

impl<const N: usize> GaugesBy<N> {
    /// All at 0.
    pub(super) fn of(&self, consumer: &str) -> [IntGauge; N] {
        self.values.map(|value| {
            let gauge = self.family.with_label_values(&[consumer, value]);
            gauge.set(0);
            gauge
        })
    }

    pub(super) fn remove(&self, consumer: &str, value: &str) {
        self.family.remove_label_values(&[consumer, value]).ok();
    }

    pub(super) fn forget(&self, consumer: &str) {
        for value in self.values {
            self.remove(consumer, value);
        }
    }
}
