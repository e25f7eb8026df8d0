//! The plan of a replay: every letter looked up, none moved.

use super::desk::{Desk, Trouble};
use super::filter::Filter;
use super::letter::Letter;
use super::lookout::{Judged, Lookout};
use super::plan::Count;
use super::replay::{Order, Way};
use crate::stop::Stop;

/// Letters that are looked up at once.
const LOOKED_UP: usize = 256;

/// What a survey found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Survey {
    /// Letters in the queue when it began.
    pub depth: u64,
    /// Where the letters stand that were asked for.
    pub count: Count,
    /// Of these, how many would be published if they had an origin.
    pub barred: u64,
}

/// What would become of one letter.
#[derive(Debug)]
pub struct Prospect<'a> {
    /// The letter.
    pub letter: &'a Letter,
    /// Where it stands.
    pub judged: &'a Judged,
    /// What would be done with it.
    pub way: Way,
    /// Why it would be left all the same.
    pub bar: Option<String>,
}

/// Looks every letter up that `filter` means, tells `each` of it, and gives all
/// of them back. Ends where a replay by `order` would, at its limit.
///
/// # Errors
///
/// [`Trouble`]; the letters go back all the same.
pub fn survey(
    mut desk: Desk<'_>,
    lookout: &mut Lookout<'_>,
    filter: &Filter,
    order: &Order,
    stop: &Stop,
    mut each: impl FnMut(&Prospect<'_>),
) -> Result<Survey, Trouble> {
    let mut survey = Survey {
        depth: desk.depth(),
        ..Survey::default()
    };
    let limit = order.limit.unwrap_or(u64::MAX);
    let topology = desk.topology();
    let mut published = 0;
    let mut look = || -> Result<(), Trouble> {
        loop {
            let letters = desk.next(stop)?;
            if letters.is_empty() {
                return Ok(());
            }
            let meant: Vec<&Letter> = letters
                .iter()
                .map(|(letter, _)| letter)
                .filter(|letter| filter.matches(letter))
                .collect();
            for some in meant.chunks(LOOKED_UP) {
                let judged = lookout.judge(desk.session(), some)?;
                for (letter, judged) in some.iter().zip(&judged) {
                    if published >= limit {
                        return Ok(());
                    }
                    let standing = judged.verdict.standing;
                    let way = order.way_of(standing);
                    let bar = order.bar(letter, topology).filter(|_| way.publishes());
                    survey.count.add(standing);
                    survey.barred += u64::from(bar.is_some());
                    published += u64::from(way.publishes() && bar.is_none());
                    each(&Prospect {
                        letter,
                        judged,
                        way,
                        bar,
                    });
                }
            }
        }
    };
    let looked = look();
    let given_back = desk.give_back();
    looked.and(given_back).map(|()| survey)
}
