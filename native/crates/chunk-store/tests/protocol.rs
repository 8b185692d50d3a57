//! All interleavings of a reader, two writers, a verifier and two evictions on one chunk, any of which (but the reader)
//! may die at any step. The rules are those of `protocol.rs`, which the store uses; the file system is two halves of a
//! chunk that are right or not. Three ways of doing it wrong must be found out.

use std::collections::HashSet;

use chunk_store::layout::{ABSENT, EVICTING, FETCHING, PRESENT, VERIFIED, next_word, state_of};
use chunk_store::protocol::{WriteStep, evict_step, evicted, write_step};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rules {
    Right,
    /// A writer publishes whatever the word is by now.
    PublishBlindly,
    /// A chunk that is to be evicted is absent at once, and punched then.
    AbsentBeforePunch,
    /// A chunk is punched before its word says so.
    PunchFirst,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Role {
    Reader,
    Writer,
    Verifier,
    Hinter,
    Evictor,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Actor {
    role: Role,
    pc: u8,
    seen: u32,
    next: u32,
    right: bool,
    tries: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    word: u32,
    halves: [bool; 2],
    /// Which actor holds the eviction lock.
    lock: Option<usize>,
    actors: Vec<Actor>,
}

const ENDED: u8 = 99;

impl World {
    fn exchange(&mut self, old: u32, new: u32) -> bool {
        let same = self.word == old;
        if same {
            self.word = new;
        }
        same
    }

    /// One step of actor `i`. Errors when something wrong was served.
    fn step(&mut self, i: usize, rules: Rules) -> Result<(), String> {
        let mut a = self.actors[i];
        match (a.role, a.pc) {
            (Role::Reader, 0) => {
                a.seen = self.word;
                a.right = true;
                a.pc = if state_of(self.word) == VERIFIED {
                    1
                } else {
                    ENDED
                };
            }
            (Role::Reader, 1 | 2) | (Role::Verifier, 1 | 2) => {
                a.right &= self.halves[usize::from(a.pc) - 1];
                a.pc += 1;
            }
            (Role::Reader, _) => {
                if self.word == a.seen && !a.right {
                    return Err("wrong bytes were served".into());
                }
                a.pc = ENDED;
            }
            (Role::Verifier, 0) => {
                a.seen = self.word;
                a.right = true;
                a.pc = match state_of(self.word) {
                    PRESENT | VERIFIED => 1,
                    _ => ENDED,
                };
            }
            (Role::Verifier, _) => {
                let state = if a.right { VERIFIED } else { ABSENT };
                if state_of(a.seen) != state {
                    self.exchange(a.seen, next_word(a.seen, state));
                }
                a.pc = ENDED;
            }
            (Role::Hinter, pc) => {
                let (from, to) = if pc == 0 {
                    (ABSENT, FETCHING)
                } else {
                    (FETCHING, ABSENT)
                };
                if state_of(self.word) == from {
                    self.word = next_word(self.word, to);
                }
                a.pc = if pc == 0 { 1 } else { ENDED };
            }
            (Role::Writer, 0) => {
                a.seen = self.word;
                match write_step(self.word) {
                    WriteStep::Write(next) => (a.next, a.pc) = (next, 1),
                    WriteStep::Done | WriteStep::Elsewhere => a.pc = ENDED,
                }
            }
            (Role::Writer, 1 | 2) => {
                self.halves[usize::from(a.pc) - 1] = true;
                a.pc += 1;
            }
            (Role::Writer, _) => {
                let published = if rules == Rules::PublishBlindly {
                    self.word = next_word(self.word, VERIFIED);
                    true
                } else {
                    self.exchange(a.seen, a.next)
                };
                a.tries += 1;
                a.pc = if published || a.tries == 2 { ENDED } else { 0 };
            }
            (Role::Evictor, 0) => {
                if self.lock.is_none() {
                    self.lock = Some(i);
                    a.pc = 1;
                }
            }
            (Role::Evictor, 1) => {
                a.seen = self.word;
                match evict_step(self.word) {
                    Some(next) => {
                        a.next = if rules == Rules::AbsentBeforePunch {
                            evicted(self.word)
                        } else {
                            next
                        };
                        a.pc = if rules == Rules::PunchFirst { 3 } else { 2 };
                    }
                    None => a.pc = 7,
                }
            }
            (Role::Evictor, 2) => a.pc = if self.exchange(a.seen, a.next) { 3 } else { 7 },
            (Role::Evictor, 3 | 4) => {
                self.halves[usize::from(a.pc) - 3] = false;
                a.pc += 1;
            }
            (Role::Evictor, 5) => {
                match rules {
                    Rules::AbsentBeforePunch => {}
                    Rules::PunchFirst => {
                        self.exchange(a.seen, evicted(a.seen));
                    }
                    _ => {
                        self.exchange(a.next, evicted(a.next));
                    }
                }
                a.pc = 7;
            }
            (Role::Evictor, _) => {
                self.lock = None;
                a.pc = ENDED;
            }
        }
        self.actors[i] = a;
        if state_of(self.word) == VERIFIED && self.halves != [true, true] {
            return Err("a hole is called verified".into());
        }
        Ok(())
    }

    fn kill(&mut self, i: usize) {
        self.actors[i].pc = ENDED;
        if self.lock == Some(i) {
            self.lock = None;
        }
    }
}

/// Visits everything that can happen from `state` on with `roles`; the number of situations, or what went wrong.
fn explore(state: u32, roles: &[Role], rules: Rules) -> Result<usize, String> {
    let actor = |role| Actor {
        role,
        pc: 0,
        seen: 0,
        next: 0,
        right: true,
        tries: 0,
    };
    let start = World {
        word: next_word(0, state),
        halves: [matches!(state, PRESENT | VERIFIED); 2],
        lock: None,
        actors: roles.iter().map(|role| actor(*role)).collect(),
    };
    let mut seen = HashSet::from([start.clone()]);
    let mut open = vec![start];
    while let Some(world) = open.pop() {
        for i in 0..world.actors.len() {
            if world.actors[i].pc == ENDED {
                continue;
            }
            let mut next = world.clone();
            next.step(i, rules)?;
            let mut dead = world.clone();
            dead.kill(i);
            for w in [next, dead] {
                if seen.insert(w.clone()) {
                    open.push(w);
                }
            }
        }
    }
    Ok(seen.len())
}

const CASTS: [&[Role]; 4] = [
    &[Role::Reader, Role::Writer, Role::Writer, Role::Evictor],
    &[Role::Reader, Role::Writer, Role::Evictor, Role::Evictor],
    &[Role::Reader, Role::Writer, Role::Verifier, Role::Evictor],
    &[Role::Writer, Role::Writer, Role::Evictor, Role::Hinter],
];
const STATES: [u32; 5] = [ABSENT, FETCHING, PRESENT, VERIFIED, EVICTING];

#[test]
fn no_order_of_steps_serves_a_hole() {
    let mut situations = 0;
    for cast in CASTS {
        for state in STATES {
            situations += explore(state, cast, Rules::Right)
                .unwrap_or_else(|e| panic!("{cast:?} from state {state}: {e}"));
        }
    }
    assert!(situations > 10_000, "only {situations} situations");
}

#[test]
fn other_rules_are_found_out() {
    for rules in [
        Rules::PublishBlindly,
        Rules::AbsentBeforePunch,
        Rules::PunchFirst,
    ] {
        let wrong = CASTS.iter().any(|cast| {
            STATES
                .iter()
                .any(|state| explore(*state, cast, rules).is_err())
        });
        assert!(wrong, "{rules:?}");
    }
}
