//! Thousands of seeded lives of a run: agents and trainers that do what real ones do, beside the state machine, in
//! virtual time. They die, freeze, lose their connection and come back; the coordinator dies too, and another
//! one takes over. A failing seed is printed and can be replayed: `CPCR_SEED=N cargo test simulation`, or
//! `CPCR_SEEDS=100000` for a long night.

use std::collections::BTreeMap;
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::events::{Effect, Event, Limits, Progress, Running};
use super::state::{Phase, State};
use super::state_tests::{came_back, joined, limits};
use crate::types::{Generation, NodeId, Rank, Step, WorldSize};

/// Steps of a simulated run.
const STEPS: u64 = 40;
/// One turn of the world.
const TURN: Duration = Duration::from_millis(250);
/// Turns after which trouble ends, and after which the run must have.
const TURNS: [u32; 2] = [400, 3000];

/// Which start of a coordinator, and which generation of it.
type Group = (u32, Generation);

/// A trainer process.
#[derive(Debug, Clone, Copy)]
struct Trainer {
    /// What it was told to join last.
    place: Option<(Group, Rank, WorldSize)>,
    /// What it has joined: the group that it believes in.
    joined: Option<Group>,
    /// Its state, if it has one.
    done: Option<Step>,
    frozen: bool,
}

/// An agent and its trainer.
#[derive(Debug, Default)]
struct Node {
    alive: bool,
    connected: bool,
    /// Since when it is not.
    away: Duration,
    /// Whether it was away for so long that the others may have gone on without it.
    late: bool,
    life: u32,
    trainer: Option<Trainer>,
}

struct World {
    seed: u64,
    rng: ChaCha8Rng,
    limits: Limits,
    state: State,
    /// When this coordinator started, and how many did before.
    epoch: Duration,
    coordinators: u32,
    now: Duration,
    nodes: BTreeMap<u32, Node>,
    /// The newest checkpoint.
    saved: Step,
    /// The steps that count, by the generation that took them: what a ledger would say.
    committed: BTreeMap<u64, Generation>,
    /// The newest group that has stepped: one before it, cut off from the coordinator, counts for itself only.
    newest: Group,
    /// The newest generation that this coordinator has given a verdict on.
    judged: Generation,
    troubled: bool,
    /// Whether what happens is printed: where one seed is replayed.
    told: bool,
    ended: Option<i32>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let max = 1 + rng.next_u32() % 4;
        let min = 1 + rng.next_u32() % max;
        let spares = rng.next_u32() % 2;
        // The world's trouble knows no bound, so neither does patience.
        let limits = Limits { min, max, spares, restarts: 1_000_000, ..limits() };
        let nodes = (0..max + spares).map(|node| (node, Node::default())).collect();
        Self {
            seed,
            rng,
            state: State::new(limits.clone()),
            limits,
            epoch: Duration::ZERO,
            coordinators: 0,
            now: Duration::ZERO,
            nodes,
            saved: Step(0),
            committed: BTreeMap::new(),
            newest: (0, Generation(0)),
            judged: Generation(0),
            troubled: true,
            told: false,
            ended: None,
        }
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.rng.next_u32().is_multiple_of(one_in)
    }

    fn tell(&mut self, event: Event) {
        if self.told {
            println!("{:?}: {event:?}", self.now);
        }
        for effect in self.state.apply(self.now - self.epoch, event) {
            if self.told {
                println!("{:?}:   {effect:?}", self.now);
            }
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        let seed = self.seed;
        match effect {
            Effect::Start { node, generation, rank, world, .. } => {
                assert!(rank.0 < world.0 && world.0 >= self.limits.min, "seed {seed}");
                let group = (self.coordinators, generation);
                let Some(trainer) = self.reach(node) else { return };
                let trainer = trainer.get_or_insert(Trainer::fresh());
                let before = trainer.place.map(|place| place.0.1);
                assert!(before.is_none_or(|g| g < generation), "seed {seed}: {generation}");
                trainer.place = Some((group, rank, world));
            }
            Effect::Prepare { node, .. } => {
                if let Some(trainer) = self.reach(node) {
                    trainer.get_or_insert(Trainer::fresh());
                }
            }
            Effect::Leave { node, generation } => {
                if let Some(Some(trainer)) = self.reach(node)
                    && !trainer.frozen
                    && trainer.joined.is_some_and(|group| group.1 == generation)
                {
                    trainer.joined = None;
                }
            }
            Effect::End { node, generation, .. } => {
                // Whoever hangs is given up, whether the order gets there or not.
                if let Some(node) = self.nodes.get_mut(&node.0) {
                    node.late = true;
                }
                if let Some(trainer) = self.reach(node)
                    && trainer
                        .as_ref()
                        .is_some_and(|t| t.place.is_some_and(|p| p.0.1 == generation))
                {
                    *trainer = None;
                    self.exited(node.0, generation, 137);
                }
            }
            Effect::CheckpointAndStop { node, .. } => {
                if let Some(Some(trainer)) = self.reach(node)
                    && !trainer.frozen
                {
                    let (done, place) = (trainer.done, trainer.place);
                    self.saved = self.saved.max(done.unwrap_or_default());
                    self.kill(node.0);
                    self.exited(node.0, place.map_or(Generation(0), |p| p.0.1), 75);
                }
            }
            Effect::Finish { status, .. } => self.ended = Some(status),
            Effect::Verdict(verdict) => {
                assert!(verdict.generation > self.judged, "seed {seed}: {verdict:?}");
                self.judged = verdict.generation;
                let victims = &verdict.victims;
                assert!(victims.iter().all(|v| Some(v.node) != verdict.cause.node), "seed {seed}");
            }
            Effect::Recorded { .. } | Effect::Attest { .. } | Effect::Note(_) => {}
        }
    }

    /// The trainer's place at a node that orders get to.
    fn reach(&mut self, node: NodeId) -> Option<&mut Option<Trainer>> {
        let node = self.nodes.get_mut(&node.0)?;
        (node.alive && node.connected).then_some(&mut node.trainer)
    }

    fn exited(&mut self, node: u32, generation: Generation, status: i32) {
        if self.nodes[&node].connected {
            self.tell(super::state_tests::exited(node, generation.0, status));
        }
    }

    fn kill(&mut self, node: u32) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.trainer = None;
        }
    }

    /// What goes wrong in a turn.
    fn trouble(&mut self) {
        let node = self.rng.next_u32() % u32::try_from(self.nodes.len()).unwrap();
        let Some(there) = self.nodes.get_mut(&node) else { return };
        let incarnation = format!("{node}.{}", there.life);
        let left = Event::Left { node: NodeId(node), incarnation };
        match self.rng.next_u32() % 40 {
            // SIGKILL of a trainer.
            0 => {
                if let Some(trainer) = there.trainer.take() {
                    self.exited(node, trainer.place.map_or(Generation(0), |p| p.0.1), 137);
                }
            }
            // Of an agent, whose trainer goes with it.
            1 if there.alive => {
                *there = Node { life: there.life, ..Node::default() };
                self.tell(left);
            }
            // A connection breaks; nobody else notices.
            2 if there.connected => {
                (there.connected, there.away) = (false, self.now);
                if self.chance(2) {
                    // Whom the others miss already is given up at once.
                    if let Some(node) = self.nodes.get_mut(&node) {
                        node.late = true;
                    }
                    self.tell(left);
                }
            }
            // SIGSTOP.
            3 => {
                if let Some(trainer) = &mut there.trainer {
                    trainer.frozen = true;
                }
            }
            // The coordinator dies, and another starts.
            4 if self.chance(3) => {
                self.state = State::new(self.limits.clone());
                self.epoch = self.now;
                self.coordinators += 1;
                self.judged = Generation(0);
                for node in self.nodes.values_mut().filter(|node| node.connected) {
                    (node.connected, node.away) = (false, self.now);
                }
            }
            _ => {}
        }
    }

    /// What agents do in a turn.
    fn agents(&mut self) {
        for number in 0..u32::try_from(self.nodes.len()).unwrap() {
            let calm = !self.troubled;
            let acts = calm || self.chance(4);
            let Some(node) = self.nodes.get_mut(&number) else { continue };
            if !acts {
                continue;
            }
            if !node.alive {
                *node = Node { alive: true, life: node.life + 1, ..Node::default() };
            }
            if node.connected {
                self.tell(Event::Heard { node: NodeId(number) });
            } else {
                node.connected = true;
                node.late |= self.now.saturating_sub(node.away) >= self.limits.grace;
                let running = node.trainer.and_then(|trainer| {
                    let ((_, generation), rank, world) = trainer.place?;
                    let stranded = trainer.joined.is_none();
                    let done = trainer.done;
                    Some(Running { generation, rank, world, stranded, done })
                });
                let event = match running {
                    Some(running) => came_back(number, node.life, running),
                    None => joined(number, node.life),
                };
                self.tell(event);
            }
            // Its pulse has stopped: the agent sees to it.
            if let Some(trainer) = self.nodes[&number].trainer
                && trainer.frozen
                && (calm || self.chance(8))
            {
                self.kill(number);
                self.exited(number, trainer.place.map_or(Generation(0), |p| p.0.1), 137);
            }
        }
    }

    /// What trainers do in a turn: join, step, notice that a peer is gone.
    fn trainers(&mut self) {
        let ids: Vec<u32> = self.nodes.keys().copied().collect();
        for id in ids {
            let Some(trainer) = self.nodes[&id].trainer.filter(|trainer| !trainer.frozen) else {
                continue;
            };
            let Some((group, _, world)) = trainer.place else {
                self.say(id, Event::TrainerStandby { node: NodeId(id) });
                continue;
            };
            let members = self.of(group);
            let lives = |id: &u32| self.nodes[id].trainer.is_some_and(|trainer| !trainer.frozen);
            let whole = members.len() == world.0 as usize && members.iter().all(lives);
            match (trainer.joined == Some(group), whole) {
                (true, true) => {}
                (false, true) => self.form(group),
                // A peer is dead, frozen or elsewhere: sooner or later it shows.
                (_, false) => {
                    if self.chance(3) {
                        self.strand(id, group.1);
                    }
                }
            }
        }
        self.step_whole_generations();
    }

    /// A generation's group forms: everyone has the most advanced state from now on.
    fn form(&mut self, group: Group) {
        let members: Vec<u32> = self.of(group);
        let best = members.iter().filter_map(|id| self.nodes[id].trainer?.done).max();
        let done = best.unwrap_or(self.saved);
        // Whoever has not been to be reached for a while is given up, with what it has.
        let patient = |node: &&Node| {
            let away = self.now.saturating_sub(node.away);
            !node.late && (node.connected || away < self.limits.grace)
        };
        let there = self.nodes.values().filter(patient);
        let elsewhere = there.filter_map(|node| node.trainer?.done).max();
        assert!(
            elsewhere.is_none_or(|step| step <= done),
            "seed {}: {group:?} goes on from {done}: {:?}",
            self.seed,
            self.nodes
        );
        // Steps that only the dead have taken are taken again, from a checkpoint on or from the returned one's state.
        self.committed = (0..done.0).map(|step| (step, group.1)).collect();
        for id in members {
            let Some(node) = self.nodes.get_mut(&id) else { continue };
            node.late = false;
            if let Some(trainer) = &mut node.trainer {
                trainer.joined = Some(group);
                trainer.done = Some(done);
            }
        }
    }

    fn of(&self, group: Group) -> Vec<u32> {
        let in_it = |node: &Node| {
            node.trainer.is_some_and(|t| t.place.is_some_and(|place| place.0 == group))
        };
        self.nodes.iter().filter(|(_, node)| in_it(node)).map(|(id, _)| *id).collect()
    }

    fn strand(&mut self, id: u32, generation: Generation) {
        let Some(trainer) = self.nodes.get_mut(&id).and_then(|node| node.trainer.as_mut()) else {
            return;
        };
        trainer.joined = None;
        let (node, done) = (NodeId(id), trainer.done);
        let evidence = "a peer was lost".to_owned();
        self.say(id, Event::TrainerStranded { node, generation, done, evidence });
    }

    fn say(&mut self, id: u32, event: Event) {
        if self.nodes[&id].connected {
            self.tell(event);
        }
    }

    fn step_whole_generations(&mut self) {
        let groups: Vec<Group> =
            self.nodes.values().filter_map(|node| node.trainer?.joined).collect();
        let Some(group) = groups.into_iter().max() else { return };
        let generation = group.1;
        let members = self.of(group);
        let trainer = |world: &Self, id: &u32| world.nodes[id].trainer;
        let Some(Trainer { place: Some((.., world)), done: Some(done), .. }) =
            members.first().and_then(|id| trainer(self, id))
        else {
            return;
        };
        let whole = members.len() == world.0 as usize
            && members
                .iter()
                .all(|id| trainer(self, id).is_some_and(|t| t.joined == Some(group) && !t.frozen));
        if !whole {
            return;
        }
        if done.0 >= STEPS {
            // The checkpoint was a complete run's.
            for id in members {
                self.kill(id);
                self.exited(id, generation, 0);
            }
            return;
        }
        if group >= self.newest {
            self.newest = group;
            let twice = self.committed.insert(done.0, generation);
            assert_eq!(twice, None, "seed {}: step {done} counts twice", self.seed);
        }
        for id in &members {
            // One that dies right here has contributed, and has not applied.
            if let Some(t) = self.nodes.get_mut(id).and_then(|node| node.trainer.as_mut()) {
                t.done = Some(done.next());
            }
        }
        if done.next().0 % 10 == 0 {
            self.saved = done.next();
        }
        for id in members {
            self.say(
                id,
                Event::Progressed {
                    node: NodeId(id),
                    generation,
                    progress: Progress::Step { done: done.next(), last: false },
                },
            );
            if done.next().0 == STEPS {
                self.kill(id);
                self.exited(id, generation, 0);
            }
        }
    }

    /// Lives until the run's end.
    fn run(mut self) -> (i32, usize) {
        for turn in 0..TURNS[1] {
            self.troubled = turn < TURNS[0];
            self.now += TURN;
            if self.troubled {
                self.trouble();
            }
            self.agents();
            self.trainers();
            self.tell(Event::Tick);
            if let Phase::Training { ranks, .. } = self.state.phase() {
                assert!(ranks.len() <= self.limits.max as usize, "seed {}", self.seed);
            }
            if let Some(status) = self.ended {
                let goodput = self.state.goodput(self.now - self.epoch);
                let wall = (self.now - self.epoch).as_secs_f64();
                let parts: f64 = goodput.parts_s.values().sum();
                assert!((parts - wall).abs() < 1e-6, "seed {}: {goodput:?} of {wall} s", self.seed);
                return (status, self.committed.len());
            }
        }
        panic!("seed {}: it does not end: {:?}", self.seed, self.state);
    }
}

impl Trainer {
    fn fresh() -> Self {
        Self { place: None, joined: None, done: None, frozen: false }
    }
}

/// No step counts twice, no state that anybody has in memory is left out, a node is told of newer
/// generations only, and the run ends: complete, or to be resumed.
#[test]
fn thousands_of_lives_lose_nothing_and_end() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let replayed = number("CPCR_SEED");
    let seeds = match replayed {
        Some(seed) => seed..seed + 1,
        None => 0..number("CPCR_SEEDS").unwrap_or(5000),
    };
    let (mut complete, mut interrupted) = (0, 0);
    for seed in seeds {
        let mut world = World::new(seed);
        world.told = replayed.is_some();
        let (status, steps) = world.run();
        match status {
            0 => {
                assert_eq!(steps as u64, STEPS, "seed {seed}");
                complete += 1;
            }
            75 => interrupted += 1,
            other => panic!("seed {seed}: status {other}"),
        }
    }
    assert!(complete > 10 * interrupted, "{complete} complete, {interrupted} interrupted");
}
