//! The plan of a replay: every letter looked up, none moved.

use super::desk::{Desk, Trouble};
use super::filter::Filter;
use super::letter::Letter;
use super::lookout::{Judged, Lookout};
use super::plan::{Count, Standing};
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
}

/// Looks every letter up that `filter` means, tells `each` of it, and gives all
/// of them back. Ends when `limit` letters would run.
///
/// # Errors
///
/// [`Trouble`]; the letters go back all the same.
pub fn survey(
    mut desk: Desk<'_>,
    lookout: &mut Lookout<'_>,
    filter: &Filter,
    limit: Option<u64>,
    stop: &Stop,
    mut each: impl FnMut(&Letter, &Judged),
) -> Result<Survey, Trouble> {
    let mut survey = Survey {
        depth: desk.depth(),
        ..Survey::default()
    };
    let limit = limit.unwrap_or(u64::MAX);
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
                    if survey.count.of(Standing::NeverApplied) >= limit {
                        return Ok(());
                    }
                    survey.count.add(judged.verdict.standing);
                    each(letter, judged);
                }
            }
        }
    };
    let looked = look();
    let given_back = desk.give_back();
    looked.and(given_back).map(|()| survey)
}
