//! What the workers and broker threads do: they carry out the protocol's
//! actions, with any luck, and report what came of them. Not one transition of
//! the protocol is written down here a second time.

use ackonce::failure::Class;
use ackonce::lifecycle::{Action, Body, Event, State};
use ackonce::message::{DeadReason, Epoch, Settlement, Ticket};

use crate::world::*;

impl Scenario {
    pub fn begin(&self) -> World {
        World {
            places: vec![Place::Queued; self.messages.len()],
            copies: (0..self.messages.len()).collect(),
            journal: vec![None; self.messages.len()],
            attempted: vec![false; self.messages.len()],
            processes: Default::default(),
            redis: [Redis::Nothing; KEYS],
            claims: [None; KEYS],
            ledger: [None; KEYS],
            effects: Default::default(),
            orphans: vec![],
            faults: self.faults,
            slips: Slips::default(),
        }
    }

    pub fn of(&self, world: &World, job: &Job) -> Published {
        self.messages[world.copies[job.message]]
    }

    /// Everything that can happen next.
    pub fn moves(&self, world: &World, moves: &mut Vec<Move>) {
        for (number, process) in world.processes.iter().enumerate() {
            if process.jobs.len() < PREFETCH {
                let all = 0..world.places.len();
                let queued = all.filter(|at| world.places[*at] == Place::Queued);
                moves.extend(queued.map(|message| Move::Deliver(message, number)));
            }
            for (index, job) in process.jobs.iter().enumerate() {
                let at = (number, index);
                let lucks = self.lucks(world, job).into_iter();
                moves.extend(lucks.map(|luck| Move::Carry(at, luck)));
                let events = self.events(world, process, job).into_iter();
                moves.extend(events.map(|event| Move::Happen(at, event)));
                if job.transaction.is_some() && world.faults.failures > 0 {
                    moves.push(Move::EndIdle(at));
                }
            }
            if !process.settlements.is_empty() {
                moves.push(Move::Settle(number));
            }
            if !process.parcels.is_empty() {
                moves.push(Move::Publish(number, Luck::Done));
                if world.faults.lost_replies > 0 {
                    moves.push(Move::Publish(number, Luck::Unanswered));
                }
            }
            if !process.confirmed.is_empty() {
                moves.push(Move::Confirm(number));
            }
            let idle = process.jobs.is_empty()
                && process.settlements.is_empty()
                && process.parcels.is_empty()
                && process.confirmed.is_empty();
            if !idle && world.faults.crashes > 0 {
                moves.push(Move::Crash(number));
            }
            if !idle && world.faults.disconnects > 0 {
                moves.push(Move::Disconnect(number));
            }
        }
        for (orphan, transaction) in world.orphans.iter().enumerate() {
            moves.push(Move::Abort(orphan));
            if transaction.commit_sent {
                moves.push(Move::Commit(orphan));
            }
        }
        let remembered = (0..KEYS).filter(|key| world.redis[*key] != Redis::Nothing);
        moves.extend(remembered.map(Move::Forget));
        for (key, claim) in world.claims.iter().enumerate() {
            let may = |claim: &Claim| claim.owner.is_none() || world.faults.lapses > 0;
            if claim.is_some_and(|claim| !claim.lapsed && may(&claim)) {
                moves.push(Move::Lapse(key));
            }
        }
    }

    /// The world after a move.
    pub fn after(&self, world: &World, chosen: Move) -> World {
        let mut world = world.clone();
        match chosen {
            Move::Deliver(message, process) => world.deliver(message, process),
            Move::Carry(at, luck) => self.carry(&mut world, at, luck),
            Move::Happen(at, event) => {
                world.faults.stops -= u8::from(event == Event::Stopping);
                let failure = FAILURES.contains(&event) || event == Event::Quarantined;
                world.faults.failures -= u8::from(failure);
                self.happen(&mut world, at, event);
            }
            Move::EndIdle((process, index)) => {
                world.faults.failures -= 1;
                world.processes[process].jobs[index].transaction = None;
            }
            Move::Settle(process) => self.settle(&mut world, process),
            Move::Publish(process, luck) => self.publish(&mut world, process, luck),
            Move::Confirm(process) => {
                let token = world.processes[process].confirmed.remove(0);
                world.rest(token, Place::Copied);
            }
            Move::Forget(key) => world.redis[key] = Redis::Nothing,
            Move::Lapse(key) => world.lapse(key),
            Move::Commit(orphan) => {
                let transaction = world.orphans.remove(orphan);
                world.commit(transaction);
            }
            Move::Abort(orphan) => {
                world.orphans.remove(orphan);
            }
            Move::Crash(process) => {
                world.faults.crashes -= 1;
                world.crash(process);
            }
            Move::Disconnect(process) => {
                world.faults.disconnects -= 1;
                world.disconnect(process);
            }
        }
        world
    }

    /// A move in words, for whoever reads a counterexample.
    pub fn tell(&self, world: &World, chosen: Move) -> String {
        let name = |(process, index): At| {
            let job = &world.processes[process].jobs[index];
            format!("process {process}, message {}", job.message)
        };
        match chosen {
            Move::Carry((process, index), luck) => {
                let action = world.processes[process].jobs[index].todo[0];
                format!("{}: {action:?}: {luck:?}", name((process, index)))
            }
            Move::Happen(at, event) => format!("{}: {event:?}", name(at)),
            Move::EndIdle(at) => format!("{}: its transaction is ended", name(at)),
            Move::Deliver(message, process) => {
                format!("process {process} is handed message {message}")
            }
            _ => format!("{chosen:?}"),
        }
    }

    /// How the next action of a delivery can go.
    fn lucks(&self, world: &World, job: &Job) -> Vec<Luck> {
        let Some(action) = job.todo.first() else {
            return vec![];
        };
        let mut lucks = match action {
            Action::Park | Action::Rollback | Action::Settle(_) => return vec![Luck::Done],
            Action::Surrender if !job.claimed => return vec![Luck::Done],
            Action::Claim => return vec![Luck::Done, Luck::NotDone, Luck::Unanswered],
            Action::MarkDone
            | Action::Release
            | Action::Surrender
            | Action::Journal(_)
            | Action::JournalAttempt => return vec![Luck::Done, Luck::NotDone],
            Action::Call => return vec![Luck::Done],
            Action::Complete => vec![Luck::Done],
            Action::Record if self.protocol.keyed => vec![Luck::Done],
            Action::Record if self.insert_waits(world, job) => vec![],
            Action::Apply | Action::Commit if job.transaction.is_none() => vec![Luck::NotDone],
            Action::Record | Action::Apply | Action::Commit => vec![Luck::Done],
        };
        if world.faults.failures > 0 {
            let can = |event: &Event| (self.protocol.step)(job.state, *event).is_ok();
            lucks.extend(FAILURES.into_iter().filter(can).map(Luck::Fails));
        }
        let commits = match action {
            Action::Commit => job.transaction.is_some(),
            Action::Record => self.protocol.keyed,
            action => *action == Action::Complete,
        };
        if commits && world.faults.lost_replies > 0 {
            lucks.push(Luck::Unanswered);
        }
        lucks
    }

    /// READ COMMITTED: an insert waits for the end of any other open
    /// transaction that holds a row of its key.
    fn insert_waits(&self, world: &World, job: &Job) -> bool {
        let key = self.of(world, job).key;
        let holds = |transaction: &Transaction| transaction.key == key;
        let mut held = world.jobs().filter_map(|other| other.transaction.as_ref());
        self.protocol.ledger_is_unique
            && world.ledger[key].is_none()
            && (world.orphans.iter().any(holds) || held.any(holds))
    }

    /// What can happen to a delivery of its own accord. Whether a stop or a
    /// quarantine may come now is the protocol's to say.
    fn events(&self, world: &World, process: &Process, job: &Job) -> Vec<Event> {
        let published = self.of(world, job);
        let mut events = vec![];
        match job.state {
            State::Received if !published.usable => {
                events.push(Event::Unusable(DeadReason::MissingId));
            }
            State::Received
                if process
                    .jobs
                    .iter()
                    .any(|other| self.owns(world, other, published)) =>
            {
                events.push(Event::Collided);
            }
            State::Received => events.push(Event::Identified),
            State::Parked if job.todo.is_empty() => {
                events.push(Event::LookAgain);
                let row = world.ledger[published.key];
                events.extend(row.map(|body| Event::Found(compare(published.body, body))));
            }
            State::Leased if job.calling => {
                events.push(Event::Succeeded);
                let can = |event: &Event| (self.protocol.step)(job.state, *event).is_ok();
                if world.faults.failures > 0 {
                    events.extend(FAILURES.into_iter().filter(can));
                }
            }
            _ => {}
        }
        if job.state == State::Leased && job.lapsed {
            events.push(Event::LeaseLost);
        }
        let open = job.transaction.is_some();
        let may = |event| !open && (self.protocol.step)(job.state, event).is_ok();
        if world.faults.stops > 0 && may(Event::Stopping) {
            events.push(Event::Stopping);
        }
        if world.faults.failures > 0 && may(Event::Quarantined) {
            events.push(Event::Quarantined);
        }
        events
    }

    /// Whether a delivery is the work in progress on the id of `published`.
    fn owns(&self, world: &World, job: &Job, published: Published) -> bool {
        let own = self.of(world, job);
        let idle = matches!(
            job.state,
            State::Received | State::Joined | State::Settled(_)
        );
        own.usable && own.key == published.key && !idle
    }

    /// Carries out the next action of a delivery and reports the reply.
    fn carry(&self, world: &mut World, (process, index): At, luck: Luck) {
        let job = &mut world.processes[process].jobs[index];
        let published = self.messages[world.copies[job.message]];
        let (action, claimed) = (job.todo[0], job.claimed);
        job.todo = &job.todo[1..];
        // With what is written into the journal goes the claim in the ledger, in
        // the same transaction; and nothing is written if it is not one's own.
        let journals = matches!(action, Action::Journal(_) | Action::JournalAttempt);
        let counts = !(journals && claimed && luck == Luck::Done)
            || surrender(world, (process, index), published.key);
        let job = &mut world.processes[process].jobs[index];
        let reply = match (action, luck) {
            (_, Luck::Fails(event)) => {
                world.faults.failures -= 1;
                Some(event)
            }
            (Action::Claim, _) => Some(claim(
                &mut world.redis[published.key],
                job.token,
                published.body,
                luck,
            )),
            (Action::Record, _) if self.protocol.keyed => {
                let reply = self.claim(world, (process, index), published);
                match luck {
                    Luck::Unanswered => {
                        world.faults.lost_replies -= 1;
                        Some(Event::Failed(Class::Systemic))
                    }
                    _ => Some(reply),
                }
            }
            (Action::Call, _) => {
                job.calling = true;
                None
            }
            (Action::Complete, _) => {
                let reply = self.complete(world, (process, index), published);
                match luck {
                    Luck::Unanswered => {
                        world.faults.lost_replies -= 1;
                        Some(Event::CommitUnknown)
                    }
                    _ => Some(reply),
                }
            }
            (Action::Surrender, Luck::Done) => {
                surrender(world, (process, index), published.key);
                None
            }
            (Action::Record, _) => Some(self.record(job, published, world.ledger[published.key])),
            (Action::Apply | Action::Commit, Luck::NotDone) => Some(Event::Failed(Class::Systemic)),
            (Action::Apply, _) => {
                if let Some(transaction) = &mut job.transaction {
                    transaction.effect = self.protocol.effect_beside_row;
                }
                if !self.protocol.effect_beside_row {
                    world.effects[published.key][usize::from(published.body)] += 1;
                }
                Some(Event::Succeeded)
            }
            (Action::Commit, _) => Some(world.commit_of((process, index), luck)),
            (Action::Journal(_) | Action::JournalAttempt, Luck::NotDone) => {
                Some(Event::JournalFailed)
            }
            _ if !counts => Some(Event::LeaseLost),
            (Action::JournalAttempt, _) => {
                world.attempted[job.message] = true;
                Some(Event::Journaled)
            }
            (Action::Journal(reason), _) => {
                world.journal[job.message] = Some(reason);
                Some(Event::Journaled)
            }
            (Action::Rollback, _) => {
                job.transaction = None;
                None
            }
            (Action::MarkDone, Luck::Done) => {
                world.redis[published.key] = Redis::Done(published.body);
                None
            }
            (Action::Release, Luck::Done) => {
                let token = job.token;
                self.release(world, published.key, token);
                None
            }
            (Action::Settle(settlement), _) => {
                let settled = (job.message, job.token, settlement);
                world.processes[process].settlements.push(settled);
                None
            }
            (Action::Park | Action::MarkDone | Action::Release | Action::Surrender, _) => None,
        };
        if let Some(event) = reply {
            self.happen(world, (process, index), event);
        }
        let finished = |job: &Job| job.todo.is_empty() && matches!(job.state, State::Settled(_));
        world.dismiss(process, finished);
    }

    /// `INSERT … ON CONFLICT DO NOTHING`, once nothing makes it wait.
    fn record(&self, job: &mut Job, published: Published, row: Option<u8>) -> Event {
        let Published { key, body, .. } = published;
        job.doubt = false;
        match row {
            Some(other) if self.protocol.ledger_is_unique => Event::Found(compare(body, other)),
            _ => {
                job.transaction = Some(Transaction {
                    key,
                    body,
                    effect: false,
                    commit_sent: false,
                });
                Event::Inserted
            }
        }
    }

    /// The claim, and the look into the ledger after it. A claim that finds a
    /// row is deleted at once.
    fn claim(&self, world: &mut World, (process, index): At, published: Published) -> Event {
        let Published { key, body, .. } = published;
        let job = &mut world.processes[process].jobs[index];
        let (own, row, there) = (job.token, world.ledger[key], world.claims[key]);
        let free = match there {
            Some(claim) => {
                claim.lapsed || claim.owner == Some(own) || !self.protocol.waits_for_lease
            }
            None => true,
        };
        job.claimed = free && row.is_none();
        match row {
            Some(other) => {
                if there.is_some_and(|claim| claim.owner == Some(own)) {
                    world.claims[key] = None;
                }
                Event::Found(compare(body, other))
            }
            None if free => {
                job.lapsed = false;
                world.claims[key] = Some(Claim {
                    owner: Some(own),
                    lapsed: false,
                });
                Event::LeaseWon
            }
            None => Event::LeaseHeld,
        }
    }

    /// The claim becomes a ledger row, if it is one's own; otherwise the ledger
    /// is asked what became of it.
    fn complete(&self, world: &mut World, (process, index): At, published: Published) -> Event {
        let Published { key, body, .. } = published;
        let own = world.processes[process].jobs[index].token;
        let ours = world.claims[key].is_some_and(|claim| claim.owner == Some(own));
        let row = world.ledger[key];
        if row.is_none() && (ours || !self.protocol.complete_compares) {
            world.claims[key] = None;
            world.ledger[key] = Some(body);
            return Event::Committed;
        }
        match row {
            Some(other) => Event::Found(compare(body, other)),
            None => Event::LeaseLost,
        }
    }

    /// Compare-and-delete.
    fn release(&self, world: &mut World, key: usize, token: Token) {
        if let Redis::Claim(holder) = world.redis[key] {
            let own = holder == Some(token);
            if own || !self.protocol.release_compares {
                world.redis[key] = Redis::Nothing;
                world.slips.stolen_claim |= !own;
            }
        }
    }

    /// Tells the protocol what happened to a delivery, and those that joined
    /// it what became of it.
    fn happen(&self, world: &mut World, (process, index): At, event: Event) {
        let job = &mut world.processes[process].jobs[index];
        let before = job.state;
        let Ok((state, todo)) = (self.protocol.step)(before, event) else {
            world.slips.illegal_event = true;
            return;
        };
        job.state = state;
        job.todo = todo;
        let ends_call = std::mem::take(&mut job.calling);
        if matches!(event, Event::LeaseLost | Event::Found(_) | Event::Journaled) {
            job.claimed = false;
        }
        if ends_call && event == Event::Succeeded {
            let Published { key, body, .. } = self.messages[world.copies[job.message]];
            let effects = &mut world.effects[key][usize::from(body)];
            *effects = (*effects + 1).min(2);
        }
        let job = &world.processes[process].jobs[index];
        let owner = self.messages[world.copies[job.message]];
        let State::Settled(settlement) = state else {
            return;
        };
        if before == State::Joined {
            return;
        }
        for other in 0..world.processes[process].jobs.len() {
            let job = &world.processes[process].jobs[other];
            let own = self.of(world, job);
            if job.state != State::Joined || own.key != owner.key {
                continue;
            }
            if settlement == Settlement::Ack {
                let body = compare(own.body, owner.body);
                self.happen(world, (process, other), Event::OwnerApplied(body));
            } else {
                // It owns the id now; any others have joined it.
                return self.happen(world, (process, other), Event::OwnerGaveUp);
            }
        }
    }

    /// The broker thread takes the next settlement to the broker.
    fn settle(&self, world: &mut World, process: usize) {
        let (message, token, settlement) = world.processes[process].settlements.remove(0);
        let present = Epoch(world.processes[process].epoch.into());
        let ticket = Ticket {
            epoch: Epoch(token.epoch.into()),
            tag: token.tag.into(),
        };
        if !(self.protocol.admits)(present, &ticket) {
            return;
        }
        if settlement == Settlement::Retry {
            world.processes[process].parcels.push((message, token));
            if self.protocol.copy_comes_first {
                return;
            }
        }
        world.rest(token, resting(settlement));
    }

    /// The publisher sends a copy again until it hears of its confirm.
    fn publish(&self, world: &mut World, process: usize, luck: Luck) {
        let (message, token) = world.processes[process].parcels[0];
        world.copy(message);
        if luck == Luck::Unanswered {
            world.faults.lost_replies -= 1;
            return;
        }
        world.processes[process].parcels.remove(0);
        if self.protocol.copy_comes_first {
            world.processes[process].confirmed.push(token);
        }
    }
}

/// Deletes the delivery's claim in the ledger, if it is its own. Whether it
/// was.
fn surrender(world: &mut World, (process, index): At, key: usize) -> bool {
    let own = world.processes[process].jobs[index].token;
    let ours = world.claims[key].is_some_and(|claim| claim.owner == Some(own));
    if ours {
        world.claims[key] = None;
    }
    ours
}

fn compare(one: u8, other: u8) -> Body {
    if one == other {
        Body::Same
    } else {
        Body::Other
    }
}

/// One script in Redis: take the claim if nothing is there, say what was.
fn claim(redis: &mut Redis, token: Token, body: u8, luck: Luck) -> Event {
    let found = *redis;
    if found == Redis::Nothing && luck != Luck::NotDone {
        *redis = Redis::Claim(Some(token));
    }
    match found {
        _ if luck != Luck::Done => Event::ClaimUnavailable,
        Redis::Nothing => Event::ClaimWon,
        Redis::Claim(_) => Event::ClaimHeld,
        Redis::Done(other) if other == body => Event::MarkedDone,
        Redis::Done(_) => Event::ClaimUnavailable,
    }
}
