use super::*;

const REASONS: [DeadReason; 7] = [
    DeadReason::Rejected,
    DeadReason::MaxAttempts,
    DeadReason::CrashLoop,
    DeadReason::MissingId,
    DeadReason::IdConflict,
    DeadReason::TooLarge,
    DeadReason::BadHeader,
];

fn states() -> Vec<State> {
    let mut states = vec![
        State::Received,
        State::Joined,
        State::Claiming,
        State::Parked,
        State::Recording,
        State::Recorded,
        State::Applied,
        State::InDoubt,
        State::Leased,
        State::Called,
        State::Deferring,
        State::Settled(Settlement::Ack),
        State::Settled(Settlement::Reject),
        State::Settled(Settlement::Requeue),
        State::Settled(Settlement::Retry),
    ];
    states.extend(REASONS.map(State::Journaling));
    states
}

fn events() -> Vec<Event> {
    let mut events = vec![
        Event::Identified,
        Event::Collided,
        Event::ClaimWon,
        Event::ClaimHeld,
        Event::ClaimUnavailable,
        Event::LookAgain,
        Event::OwnerGaveUp,
        Event::Inserted,
        Event::LeaseWon,
        Event::LeaseHeld,
        Event::LeaseLost,
        Event::Succeeded,
        Event::Failed(Class::Transient),
        Event::Failed(Class::Permanent),
        Event::Failed(Class::Systemic),
        Event::BatchFailed,
        Event::Committed,
        Event::CommitUnknown,
        Event::Exhausted,
        Event::Quarantined,
        Event::Journaled,
        Event::JournalFailed,
        Event::Stopping,
        Event::MarkedDone,
    ];
    events.extend(REASONS.map(Event::Unusable));
    for body in [Body::Same, Body::Other] {
        events.extend([Event::OwnerApplied(body), Event::Found(body)]);
    }
    events
}

/// The legal steps that a keyed handler alone makes.
fn legal_when_keyed() -> Vec<(State, Event, State)> {
    use Class::{Permanent, Systemic, Transient};
    use Event::*;
    use State::*;
    const ACK: State = Settled(Settlement::Ack);
    const REQUEUE: State = Settled(Settlement::Requeue);
    const CONFLICT: State = Journaling(DeadReason::IdConflict);
    const REJECTED: State = Journaling(DeadReason::Rejected);
    const USED_UP: State = Journaling(DeadReason::MaxAttempts);

    vec![
        (Recording, LeaseWon, Leased),
        (Recording, LeaseHeld, Parked),
        (Leased, Succeeded, Called),
        (Leased, Failed(Permanent), REJECTED),
        (Leased, Failed(Transient), Deferring),
        (Leased, Exhausted, USED_UP),
        (Leased, Failed(Systemic), Leased),
        (Leased, LeaseLost, Recording),
        (Leased, Stopping, REQUEUE),
        (Called, Committed, ACK),
        (Called, Found(Body::Same), ACK),
        (Called, Found(Body::Other), CONFLICT),
        (Called, CommitUnknown, Called),
        (Called, Failed(Permanent), Called),
        (Called, Failed(Transient), Called),
        (Called, Failed(Systemic), Called),
        (Called, LeaseLost, Recording),
        (Called, Stopping, REQUEUE),
        (REJECTED, LeaseLost, Recording),
        (USED_UP, LeaseLost, Recording),
        (Deferring, LeaseLost, Recording),
    ]
}

/// Every legal step, as `(state, event)` to the next state.
fn legal() -> Vec<(State, Event, State)> {
    use Class::{Permanent, Systemic, Transient};
    use Event::*;
    use State::*;
    const ACK: State = Settled(Settlement::Ack);
    const REQUEUE: State = Settled(Settlement::Requeue);
    const CONFLICT: State = Journaling(DeadReason::IdConflict);
    const REJECTED: State = Journaling(DeadReason::Rejected);
    const USED_UP: State = Journaling(DeadReason::MaxAttempts);

    let mut table = vec![
        (Received, Identified, Claiming),
        (Received, Collided, Joined),
        (Received, Stopping, REQUEUE),
        (Joined, OwnerApplied(Body::Same), ACK),
        (Joined, OwnerApplied(Body::Other), CONFLICT),
        (Joined, OwnerGaveUp, Claiming),
        (Joined, Stopping, REQUEUE),
        (Claiming, ClaimWon, Recording),
        (Claiming, ClaimUnavailable, Recording),
        (Claiming, ClaimHeld, Parked),
        (Claiming, MarkedDone, ACK),
        (Claiming, Stopping, REQUEUE),
        (Parked, LookAgain, Claiming),
        (Parked, Found(Body::Same), ACK),
        (Parked, Found(Body::Other), CONFLICT),
        (Parked, Stopping, REQUEUE),
        (Recording, Inserted, Recorded),
        (Recording, Found(Body::Same), ACK),
        (Recording, Found(Body::Other), CONFLICT),
        (Recording, Failed(Permanent), REJECTED),
        (Recording, Failed(Transient), Recording),
        (Recording, Failed(Systemic), Recording),
        (Recording, BatchFailed, Recording),
        (Recording, Quarantined, Journaling(DeadReason::CrashLoop)),
        (Recording, Stopping, REQUEUE),
        (Recorded, Succeeded, Applied),
        (Recorded, Failed(Permanent), REJECTED),
        (Recorded, Failed(Transient), Deferring),
        (Recorded, Exhausted, USED_UP),
        (Recorded, Failed(Systemic), Recording),
        (Recorded, BatchFailed, Recording),
        (Applied, Committed, ACK),
        (Applied, CommitUnknown, InDoubt),
        (Applied, Failed(Permanent), REJECTED),
        (Applied, Failed(Transient), Deferring),
        (Applied, Exhausted, USED_UP),
        (Applied, Failed(Systemic), Recording),
        (Applied, BatchFailed, Recording),
        (InDoubt, Inserted, Recorded),
        (InDoubt, Found(Body::Same), ACK),
        (InDoubt, Found(Body::Other), CONFLICT),
        (InDoubt, Failed(Permanent), InDoubt),
        (InDoubt, Failed(Transient), InDoubt),
        (InDoubt, Failed(Systemic), InDoubt),
        (InDoubt, BatchFailed, InDoubt),
        (InDoubt, Stopping, REQUEUE),
        (Deferring, Journaled, Settled(Settlement::Retry)),
        (Deferring, JournalFailed, Deferring),
        (Deferring, Stopping, REQUEUE),
    ];
    table.extend(legal_when_keyed());
    for reason in REASONS {
        table.extend([
            (Received, Unusable(reason), Journaling(reason)),
            (Journaling(reason), Journaled, Settled(Settlement::Reject)),
            (Journaling(reason), JournalFailed, Journaling(reason)),
            (Journaling(reason), Stopping, REQUEUE),
        ]);
    }
    table
}

/// Every pair of a state and an event that steps, with its step.
fn steps() -> Vec<(State, Event, Step)> {
    states()
        .into_iter()
        .flat_map(|state| events().into_iter().map(move |event| (state, event)))
        .filter_map(|(state, event)| Some((state, event, step(state, event).ok()?)))
        .collect()
}

#[test]
fn every_pair_of_state_and_event_steps_as_the_table_says_or_is_illegal() {
    let table = legal();
    for state in states() {
        for event in events() {
            let next = step(state, event).map(|(next, _)| next);
            let wanted = table
                .iter()
                .find(|(from, by, _)| (*from, *by) == (state, event))
                .map(|(_, _, to)| *to)
                .ok_or(Illegal { state, event });
            assert_eq!(next, wanted, "{event:?} in {state:?}");
        }
    }
}

#[test]
fn a_settled_delivery_never_moves() {
    for (state, event, _) in steps() {
        assert!(!matches!(state, State::Settled(_)), "moved by {event:?}");
    }
}

#[test]
fn the_broker_is_told_once_and_last_and_what_the_state_says() {
    for (state, event, (next, actions)) in steps() {
        let told: Vec<Action> = actions
            .iter()
            .copied()
            .filter(|action| matches!(action, Action::Settle(_)))
            .collect();
        let wanted = match next {
            State::Settled(settlement) => vec![Action::Settle(settlement)],
            _ => vec![],
        };
        assert_eq!(told, wanted, "{event:?} in {state:?}");
        if let Some(settle) = told.last() {
            assert_eq!(actions.last(), Some(settle), "{event:?} in {state:?}");
        }
    }
}

#[test]
fn only_news_of_a_committed_row_leads_to_an_ack() {
    for (state, event, (next, _)) in steps() {
        if next == State::Settled(Settlement::Ack) {
            let committed = matches!(
                event,
                Event::Committed
                    | Event::Found(Body::Same)
                    | Event::MarkedDone
                    | Event::OwnerApplied(Body::Same)
            );
            assert!(committed, "{event:?} in {state:?}");
        }
    }
}

#[test]
fn only_a_committed_row_of_this_body_is_marked_done() {
    for (state, event, (_, actions)) in steps() {
        if actions.contains(&Action::MarkDone) {
            let committed = matches!(event, Event::Committed | Event::Found(Body::Same));
            assert!(committed, "{event:?} in {state:?}");
        }
    }
}

#[test]
fn a_message_is_deferred_only_after_its_attempt_is_in_the_journal() {
    for (state, event, (next, actions)) in steps() {
        if next == State::Settled(Settlement::Retry) {
            assert_eq!((state, event), (State::Deferring, Event::Journaled));
            assert_eq!(actions.first(), Some(&Action::Release));
        }
    }
}

#[test]
fn a_handler_that_succeeded_leads_to_nothing_but_an_ack_or_another_look() {
    for (state, event, (next, actions)) in steps() {
        if state == State::Called {
            let surrenders = actions.contains(&Action::Surrender);
            assert!(!surrenders, "{event:?}: it would be run again at once");
            assert!(next != State::Settled(Settlement::Reject), "{event:?}");
            assert!(next != State::Deferring, "{event:?}");
        }
    }
}

#[test]
fn an_illegal_step_names_its_state_and_event() {
    let illegal = Illegal {
        state: State::Parked,
        event: Event::Committed,
    };
    assert_eq!(
        illegal.to_string(),
        "illegal transition: Committed in state Parked"
    );
}
