//! The protocol of `ackonce::lifecycle`, walked through every interleaving of
//! a small world: two processes, a broker, Redis, PostgreSQL, and whatever can
//! go wrong between them. Protocols that break one rule each (mutants) must be
//! caught by the same properties.
//!
//! Left out: batches as one transaction (that a batch fails is the event
//! `BatchFailed`, at any time), `multiple` acks, and time: a lease runs out,
//! or Redis forgets, whenever it does the most harm.

#[path = "model/workers.rs"]
mod workers;
#[path = "model/world.rs"]
mod world;

use ackonce::failure::Class;
use ackonce::lifecycle::{self, Action, Body, Event, State};
use ackonce::message::{DeadReason, Settlement};
use stateright::{Checker, HasDiscoveries, Model, Property};
use world::{
    BODIES, Faults, Job, KEYED, Move, Place, Protocol, Published, REAL, Redis, Scenario, World,
};

impl Model for Scenario {
    type State = World;
    type Action = Move;

    fn init_states(&self) -> Vec<World> {
        vec![self.begin()]
    }

    fn actions(&self, world: &World, moves: &mut Vec<Move>) {
        self.moves(world, moves);
    }

    fn next_state(&self, world: &World, chosen: Move) -> Option<World> {
        Some(self.after(world, chosen))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = invariants();
        let sightings = sightings().into_iter();
        properties.extend(sightings.filter(|property| self.seen.contains(&property.name)));
        properties
    }
}

const ONCE: &str = "no key takes effect twice";
const TOGETHER: &str = "an effect stands beside its ledger row, and a row beside its effect";
const ACKED: &str = "a message is acked only when a row with its body is committed";
const REJECTED: &str = "a message is rejected only with its reason in the journal";
const CONFLICT: &str = "an id conflict stands beside a committed row of another body";
const DONE: &str = "a done mark speaks of a committed row";
const COPIED: &str = "a message is removed for a retry only when a copy of it is in a queue";
const ATTEMPTED: &str = "a message is retried only with its failed attempt in the journal";
const CLAIM: &str = "a release deletes only its own claim";
const KEPT: &str = "no unacked delivery is forgotten";
const LEGAL: &str = "no event is illegal";
const STRAY: &str = "every settlement finds its delivery";
const DOUBT: &str = "an unanswered commit is looked up before its message is rejected";
const ALONE: &str = "two handlers run for one key only if a lease ran out under one of them";
const OWNED: &str = "who has called, or calls, under a lease that goes on has the claim";
const NOT_BOTH: &str = "no claim stands beside a ledger row of its key";
const REST: &str = "every message comes to rest";

fn invariants() -> Vec<Property<Scenario>> {
    vec![
        Property::always(ONCE, |scenario: &Scenario, world: &World| {
            // A keyed handler's effect comes twice when the first one could not
            // be completed.
            let Faults {
                crashes,
                stops,
                lapses,
                ..
            } = scenario.faults;
            if scenario.protocol.keyed && crashes + stops + lapses > 0 {
                return true;
            }
            world
                .effects
                .iter()
                .all(|bodies| bodies.iter().sum::<u8>() <= 1)
        }),
        Property::always(TOGETHER, |scenario: &Scenario, world: &World| {
            let agree = |row: &Option<u8>, bodies: &[u8; BODIES]| match scenario.protocol.keyed {
                false => (0..)
                    .zip(bodies)
                    .all(|(body, count)| (*count > 0) == (*row == Some(body))),
                true => row.is_none_or(|body| bodies[usize::from(body)] > 0),
            };
            world
                .ledger
                .iter()
                .zip(&world.effects)
                .all(|(row, bodies)| agree(row, bodies))
        }),
        Property::always(ACKED, |scenario: &Scenario, world: &World| {
            world.decided(Settlement::Ack).all(|message| {
                let Published { key, body, .. } = scenario.messages[world.copies[message]];
                world.ledger[key] == Some(body)
            })
        }),
        Property::always(REJECTED, |_, world: &World| {
            world
                .decided(Settlement::Reject)
                .all(|message| world.journal[message].is_some())
        }),
        Property::always(CONFLICT, |scenario: &Scenario, world: &World| {
            let messages = world.copies.iter().map(|of| scenario.messages[*of]);
            messages.zip(&world.journal).all(|(message, reason)| {
                *reason != Some(DeadReason::IdConflict)
                    || world.ledger[message.key].is_some_and(|body| body != message.body)
            })
        }),
        Property::always(DONE, |_, world: &World| {
            world
                .redis
                .iter()
                .zip(&world.ledger)
                .all(|(redis, row)| match redis {
                    Redis::Done(body) => *row == Some(*body),
                    Redis::Nothing | Redis::Claim(_) => true,
                })
        }),
        Property::always(KEPT, |_, world: &World| {
            world.places.iter().all(|place| match *place {
                Place::Unacked(process, tag) => world.is_in_hand(process, tag),
                Place::Queued | Place::Acked | Place::Dead | Place::Copied => true,
            })
        }),
        Property::always(DOUBT, |_, world: &World| {
            let given_up = |state| matches!(state, State::Journaling(_) | State::Deferring);
            !world.jobs().any(|job| job.doubt && given_up(job.state))
        }),
        Property::always(COPIED, |_, world: &World| {
            let copied = |at: &usize| world.places[*at] == Place::Copied;
            let mut all = (0..world.places.len()).filter(copied);
            all.all(|at| world.copies[at + 1..].contains(&world.copies[at]))
        }),
        Property::always(ATTEMPTED, |_, world: &World| {
            world
                .decided(Settlement::Retry)
                .all(|message| world.attempted[message])
        }),
        Property::always(CLAIM, |_, world: &World| !world.slips.stolen_claim),
        Property::always(LEGAL, |_, world: &World| !world.slips.illegal_event),
        Property::always(STRAY, |_, world: &World| !world.slips.stray_settlement),
        Property::always(ALONE, |scenario: &Scenario, world: &World| {
            let kept = |job: &&Job| job.calling && !job.lapsed;
            let keys = || {
                world
                    .jobs()
                    .filter(kept)
                    .map(|job| scenario.of(world, job).key)
            };
            keys().all(|key| keys().filter(|other| *other == key).count() == 1)
        }),
        Property::always(OWNED, |scenario: &Scenario, world: &World| {
            let bound = |job: &&Job| matches!(job.state, State::Leased) && !job.lapsed;
            world.jobs().filter(bound).all(|job| {
                let claim = world.claims[scenario.of(world, job).key];
                claim.is_some_and(|claim| claim.owner == Some(job.token))
            })
        }),
        Property::always(NOT_BOTH, |_, world: &World| {
            let mut keys = world.claims.iter().zip(&world.ledger);
            keys.all(|(claim, row)| claim.is_none() || row.is_none())
        }),
        // A state in which nothing can move any more and a message is not at
        // rest would be a counterexample.
        Property::eventually(REST, |_, world: &World| {
            let resting =
                |place: &Place| matches!(place, Place::Acked | Place::Dead | Place::Copied);
            world.places.iter().all(resting)
        }),
    ]
}

const ALL_ACKED: &str = "everything is acked, the duplicates too";
const DEAD_REJECTED: &str = "a rejected message is dead-lettered";
const DEAD_CONFLICT: &str = "an id conflict is dead-lettered";
const DEAD_MISSING: &str = "a message without id is dead-lettered";
const USED_UP: &str = "a message whose attempts are used up is dead-lettered";
const QUARANTINED: &str = "a message that kills its worker is dead-lettered";
const RETRIED: &str = "a message is acked after its retry";
const TWICE_COPIED: &str = "a copy that went unanswered is in the queue twice";
const PARKED: &str = "a delivery is parked";
const JOINED: &str = "a delivery joins another";
const IN_DOUBT: &str = "a commit is in doubt and its transaction still open";
const OVERTAKEN: &str = "two workers are past the claim of one key";
const TAKEN_OVER: &str = "a handler runs while its claim is another's";
const LATE: &str = "a handler comes back when its claim is another's";
const STALE: &str = "a settlement outlives its connection";

/// What must be seen to happen, or the walk would prove nothing.
fn sightings() -> Vec<Property<Scenario>> {
    fn dead(world: &World, reason: DeadReason) -> bool {
        let mut messages = world.places.iter().zip(&world.journal);
        messages.any(|message| message == (&Place::Dead, &Some(reason)))
    }
    fn any(world: &World, state: State) -> bool {
        world.jobs().any(|job| job.state == state)
    }
    vec![
        Property::sometimes(ALL_ACKED, |_, world: &World| {
            world.places.iter().all(|place| *place == Place::Acked)
        }),
        Property::sometimes(DEAD_REJECTED, |_, world| dead(world, DeadReason::Rejected)),
        Property::sometimes(DEAD_CONFLICT, |_, world| {
            dead(world, DeadReason::IdConflict)
        }),
        Property::sometimes(DEAD_MISSING, |_, world| dead(world, DeadReason::MissingId)),
        Property::sometimes(USED_UP, |_, world| dead(world, DeadReason::MaxAttempts)),
        Property::sometimes(QUARANTINED, |_, world| dead(world, DeadReason::CrashLoop)),
        Property::sometimes(RETRIED, |_, world: &World| {
            world.places.contains(&Place::Copied)
                && world
                    .places
                    .iter()
                    .all(|place| matches!(place, Place::Acked | Place::Copied))
        }),
        Property::sometimes(TWICE_COPIED, |scenario: &Scenario, world: &World| {
            world.copies.len() > scenario.messages.len() + 1
        }),
        Property::sometimes(PARKED, |_, world| any(world, State::Parked)),
        Property::sometimes(JOINED, |_, world| any(world, State::Joined)),
        Property::sometimes(IN_DOUBT, |_, world| {
            any(world, State::InDoubt) && !world.orphans.is_empty()
        }),
        Property::sometimes(OVERTAKEN, |scenario: &Scenario, world: &World| {
            let past = |job: &Job| {
                matches!(
                    job.state,
                    State::Recording | State::Recorded | State::Applied
                ) && scenario.of(world, job).key == 0
            };
            world
                .processes
                .iter()
                .all(|process| process.jobs.iter().any(past))
        }),
        Property::sometimes(TAKEN_OVER, |scenario: &Scenario, world: &World| {
            let mut jobs = world.jobs();
            jobs.any(|job| job.calling && is_anothers(scenario, world, job))
        }),
        Property::sometimes(LATE, |scenario: &Scenario, world: &World| {
            let mut jobs = world.jobs();
            jobs.any(|job| job.state == State::Called && is_anothers(scenario, world, job))
        }),
        Property::sometimes(STALE, |_, world: &World| {
            world.processes.iter().any(|process| {
                let mut settlements = process.settlements.iter();
                settlements.any(|(_, token, _)| token.epoch != process.epoch)
            })
        }),
    ]
}

/// Whether the claim on the key of `job` is that of another delivery.
fn is_anothers(scenario: &Scenario, world: &World, job: &Job) -> bool {
    let claim = world.claims[scenario.of(world, job).key];
    let owner = claim.and_then(|claim| claim.owner);
    owner.is_some_and(|owner| owner != job.token)
}

const FIRST: Published = Published {
    key: 0,
    body: 0,
    usable: true,
};

const NO_FAULTS: Faults = Faults {
    crashes: 0,
    disconnects: 0,
    failures: 0,
    lost_replies: 0,
    stops: 0,
    lapses: 0,
};

/// Two copies of one message.
const DUPLICATES: Scenario = Scenario {
    protocol: REAL,
    messages: &[FIRST, FIRST],
    faults: Faults {
        crashes: 1,
        failures: 1,
        ..NO_FAULTS
    },
    seen: &[ALL_ACKED, DEAD_REJECTED, PARKED, JOINED, OVERTAKEN],
};

/// Two copies of one message, while commits go unanswered and daemons stop.
const DOUBTFUL: Scenario = Scenario {
    faults: Faults {
        crashes: 1,
        lost_replies: 1,
        stops: 1,
        ..NO_FAULTS
    },
    seen: &[ALL_ACKED, PARKED, JOINED, IN_DOUBT, OVERTAKEN],
    ..DUPLICATES
};

/// Two copies of one message, while connections are lost.
const RECONNECTING: Scenario = Scenario {
    faults: Faults {
        disconnects: 1,
        lost_replies: 1,
        ..NO_FAULTS
    },
    seen: &[ALL_ACKED, PARKED, JOINED, IN_DOUBT, OVERTAKEN, STALE],
    ..DUPLICATES
};

/// Two messages, while connections are lost.
const TWO_KEYS: Scenario = Scenario {
    messages: &[FIRST, Published { key: 1, ..FIRST }],
    faults: Faults {
        disconnects: 1,
        ..NO_FAULTS
    },
    seen: &[ALL_ACKED, STALE],
    ..RECONNECTING
};

/// Two messages under one id.
const CONFLICTING: Scenario = Scenario {
    messages: &[FIRST, Published { body: 1, ..FIRST }],
    faults: Faults {
        failures: 1,
        lost_replies: 1,
        ..NO_FAULTS
    },
    seen: &[DEAD_REJECTED, DEAD_CONFLICT, PARKED, JOINED, IN_DOUBT],
    ..DUPLICATES
};

/// A message, and one that has no usable id.
const WITHOUT_ID: Scenario = Scenario {
    messages: &[
        FIRST,
        Published {
            key: 1,
            usable: false,
            ..FIRST
        },
    ],
    seen: &[DEAD_REJECTED, DEAD_MISSING, IN_DOUBT],
    ..CONFLICTING
};

/// One message, retried, while daemons die.
const RETRYING: Scenario = Scenario {
    messages: &[FIRST],
    faults: Faults {
        crashes: 1,
        failures: 1,
        lost_replies: 1,
        ..NO_FAULTS
    },
    seen: &[
        ALL_ACKED,
        DEAD_REJECTED,
        USED_UP,
        QUARANTINED,
        RETRIED,
        TWICE_COPIED,
    ],
    ..DUPLICATES
};

/// One message, retried, while connections are lost.
const RETRYING_OVER: Scenario = Scenario {
    faults: Faults {
        disconnects: 1,
        failures: 1,
        ..NO_FAULTS
    },
    seen: &[ALL_ACKED, RETRIED, STALE],
    ..RETRYING
};

/// Two copies of one message with a keyed handler, while leases run out and
/// daemons die.
const KEYED_LAPSES: Scenario = Scenario {
    protocol: KEYED,
    faults: Faults {
        crashes: 1,
        lapses: 1,
        ..NO_FAULTS
    },
    seen: &[ALL_ACKED, PARKED, JOINED, TAKEN_OVER, LATE],
    ..DUPLICATES
};

/// The same, while commits go unanswered and nothing else fails.
const KEYED_DOUBTS: Scenario = Scenario {
    faults: Faults {
        lost_replies: 2,
        ..NO_FAULTS
    },
    seen: &[ALL_ACKED, PARKED, JOINED],
    ..KEYED_LAPSES
};

/// The same, while handlers fail, late for one.
const KEYED_FAILURES: Scenario = Scenario {
    faults: Faults {
        failures: 1,
        lapses: 1,
        ..NO_FAULTS
    },
    seen: &[
        ALL_ACKED,
        DEAD_REJECTED,
        USED_UP,
        PARKED,
        JOINED,
        TAKEN_OVER,
        LATE,
    ],
    ..KEYED_LAPSES
};

/// The same, while daemons stop.
const KEYED_STOPS: Scenario = Scenario {
    faults: Faults {
        lapses: 1,
        stops: 1,
        ..NO_FAULTS
    },
    ..KEYED_LAPSES
};

/// Two messages under one id with a keyed handler.
const KEYED_CONFLICTS: Scenario = Scenario {
    messages: &[FIRST, Published { body: 1, ..FIRST }],
    faults: Faults {
        lapses: 1,
        lost_replies: 1,
        ..NO_FAULTS
    },
    seen: &[DEAD_CONFLICT, PARKED, JOINED, TAKEN_OVER, LATE],
    ..KEYED_LAPSES
};

/// One message with a keyed handler, retried, while daemons die.
const KEYED_RETRIES: Scenario = Scenario {
    messages: &[FIRST],
    faults: Faults {
        crashes: 1,
        failures: 1,
        ..NO_FAULTS
    },
    seen: &[ALL_ACKED, DEAD_REJECTED, USED_UP, QUARANTINED, RETRIED],
    ..KEYED_LAPSES
};

/// Walks everything, which must be no less than `least` distinct states.
#[track_caller]
fn walk(scenario: Scenario, least: usize) {
    let checker = scenario.checker().threads(2).spawn_dfs().join();
    checker.assert_properties();
    let states = checker.unique_state_count();
    println!("{states} distinct states");
    assert!(states >= least, "only {states} states were walked");
}

/// Walks a broken protocol until `property` is violated.
#[track_caller]
fn assert_caught(scenario: Scenario, mutant: Protocol, property: &'static str) {
    let scenario = Scenario {
        protocol: mutant,
        ..scenario
    };
    let checker = scenario
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyOf([property].into()))
        .spawn_bfs()
        .join();
    let Some(path) = checker.discovery(property) else {
        panic!("the mutant was not caught by \"{property}\"");
    };
    println!("not \"{property}\":");
    for (number, (world, chosen)) in (1..).zip(path.into_vec()) {
        if let Some(chosen) = chosen {
            println!("{number:4}. {}", scenario.tell(&world, chosen));
        }
    }
}

#[test]
fn two_copies_of_a_message_are_applied_once_whatever_happens() {
    walk(DUPLICATES, 200_000);
}

#[test]
fn two_copies_are_applied_once_though_commits_go_unanswered() {
    walk(DOUBTFUL, 50_000);
}

#[test]
fn two_copies_are_applied_once_while_connections_are_lost() {
    walk(RECONNECTING, 300_000);
}

#[test]
fn two_messages_are_not_taken_for_each_other_while_connections_are_lost() {
    walk(TWO_KEYS, 100_000);
}

#[test]
fn two_bodies_under_one_id_are_never_both_applied() {
    walk(CONFLICTING, 100_000);
}

#[test]
fn a_message_without_id_harms_nobody() {
    walk(WITHOUT_ID, 10_000);
}

#[test]
fn a_message_that_is_retried_is_applied_once_and_never_lost() {
    walk(RETRYING, 10_000);
}

#[test]
fn a_message_that_is_retried_over_another_connection_is_never_lost() {
    walk(RETRYING_OVER, 10_000);
}

#[test]
fn a_keyed_handler_runs_alone_under_its_lease_and_what_is_acked_is_done() {
    walk(KEYED_LAPSES, 10_000);
}

#[test]
fn a_keyed_handler_runs_once_though_commits_go_unanswered() {
    walk(KEYED_DOUBTS, 5_000);
}

#[test]
fn what_a_keyed_handler_says_late_does_not_count() {
    walk(KEYED_FAILURES, 10_000);
}

#[test]
fn a_stop_leaves_a_keyed_handlers_claim_to_who_has_it() {
    walk(KEYED_STOPS, 10_000);
}

#[test]
fn two_bodies_under_one_id_are_never_both_done_by_a_keyed_handler() {
    walk(KEYED_CONFLICTS, 10_000);
}

#[test]
fn a_message_with_a_keyed_handler_is_retried_and_never_lost() {
    walk(KEYED_RETRIES, 1_000);
}

#[test]
fn a_claim_taken_over_before_its_lease_ends_is_caught() {
    let mutant = Protocol {
        waits_for_lease: false,
        ..KEYED
    };
    assert_caught(KEYED_LAPSES, mutant, ALONE);
    assert_caught(KEYED_DOUBTS, mutant, ONCE);
}

#[test]
fn a_claim_completed_by_who_does_not_own_it_is_caught() {
    let mutant = Protocol {
        complete_compares: false,
        ..KEYED
    };
    assert_caught(KEYED_LAPSES, mutant, OWNED);
}

#[test]
fn an_ack_before_the_claim_is_completed_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Leased, Event::Succeeded) => Ok((
                State::Called,
                &[Action::Settle(Settlement::Ack), Action::Complete],
            )),
            (State::Called, Event::Committed) => {
                Ok((State::Settled(Settlement::Ack), &[Action::MarkDone]))
            }
            _ => lifecycle::step(state, event),
        },
        ..KEYED
    };
    assert_caught(KEYED_LAPSES, mutant, ACKED);
}

#[test]
fn a_handler_called_before_its_claim_is_committed_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Recording, Event::LeaseHeld) => lifecycle::step(state, Event::LeaseWon),
            _ => lifecycle::step(state, event),
        },
        ..KEYED
    };
    assert_caught(KEYED_LAPSES, mutant, ALONE);
}

#[test]
fn a_held_claim_treated_as_a_duplicate_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Claiming, Event::ClaimHeld) => lifecycle::step(state, Event::MarkedDone),
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    assert_caught(DUPLICATES, mutant, ACKED);
}

#[test]
fn working_without_the_ledger_is_caught() {
    let mutant = Protocol {
        ledger_is_unique: false,
        ..REAL
    };
    assert_caught(DUPLICATES, mutant, ONCE);
}

#[test]
fn an_ack_before_the_commit_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Recorded, Event::Succeeded) => Ok((
                State::Applied,
                &[Action::Settle(Settlement::Ack), Action::Commit],
            )),
            (State::Applied, Event::Committed) => {
                Ok((State::Settled(Settlement::Ack), &[Action::MarkDone]))
            }
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    assert_caught(DUPLICATES, mutant, ACKED);
}

#[test]
fn an_effect_outside_the_ledgers_transaction_is_caught() {
    let mutant = Protocol {
        effect_beside_row: false,
        ..REAL
    };
    assert_caught(DUPLICATES, mutant, TOGETHER);
    assert_caught(DUPLICATES, mutant, ONCE);
}

#[test]
fn a_stale_ack_on_a_new_connection_is_caught() {
    let mutant = Protocol {
        admits: |_, _| true,
        ..REAL
    };
    assert_caught(TWO_KEYS, mutant, ACKED);
}

#[test]
fn a_release_without_its_token_is_caught() {
    let mutant = Protocol {
        release_compares: false,
        ..REAL
    };
    assert_caught(DUPLICATES, mutant, CLAIM);
}

#[test]
fn a_done_mark_before_the_commit_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Recorded, Event::Succeeded) => {
                Ok((State::Applied, &[Action::MarkDone, Action::Commit]))
            }
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    assert_caught(DUPLICATES, mutant, DONE);
    assert_caught(DUPLICATES, mutant, ACKED);
}

#[test]
fn an_unanswered_commit_taken_for_committed_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Applied, Event::CommitUnknown) => lifecycle::step(state, Event::Committed),
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    assert_caught(DOUBTFUL, mutant, ACKED);
}

#[test]
fn an_unanswered_commit_taken_for_failed_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Applied, Event::CommitUnknown) => Ok((State::Recording, &[Action::Record])),
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    assert_caught(CONFLICTING, mutant, DOUBT);
}

#[test]
fn another_body_taken_for_a_duplicate_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Recording, Event::Found(Body::Other)) => {
                lifecycle::step(state, Event::Found(Body::Same))
            }
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    assert_caught(CONFLICTING, mutant, ACKED);
}

#[test]
fn a_reject_before_its_reason_is_written_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Recorded, Event::Failed(Class::Permanent)) => Ok((
                State::Settled(Settlement::Reject),
                &[
                    Action::Rollback,
                    Action::Release,
                    Action::Settle(Settlement::Reject),
                ],
            )),
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    assert_caught(DUPLICATES, mutant, REJECTED);
}

#[test]
fn a_joined_delivery_that_is_never_told_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Joined, Event::OwnerGaveUp | Event::OwnerApplied(_)) => Ok((state, &[])),
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    let scenario = Scenario {
        faults: NO_FAULTS,
        ..DUPLICATES
    };
    assert_caught(scenario, mutant, REST);
}

#[test]
fn a_message_removed_before_its_copy_is_confirmed_is_caught() {
    let mutant = Protocol {
        copy_comes_first: false,
        ..REAL
    };
    assert_caught(RETRYING, mutant, COPIED);
}

#[test]
fn a_retry_before_its_attempt_is_written_is_caught() {
    let mutant = Protocol {
        step: |state, event| match (state, event) {
            (State::Recorded, Event::Failed(Class::Transient)) => Ok((
                State::Settled(Settlement::Retry),
                &[
                    Action::Rollback,
                    Action::Release,
                    Action::Settle(Settlement::Retry),
                ],
            )),
            _ => lifecycle::step(state, event),
        },
        ..REAL
    };
    assert_caught(RETRYING, mutant, ATTEMPTED);
}
