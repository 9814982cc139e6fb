//! Plays tests/scenarios/failover/*.txt: what happens to the machine, and what it wants done about it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use highwater::failover::decide::{Durability, Machine, Mode, NodeRule, Settings};
use highwater::failover::event::*;
use highwater::failover::record::{Record, Stage, SyncState};
use highwater::topology::{Epoch, NodeId};
use highwater::wal::{Lsn, TimelineId};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn node(word: &str) -> Option<NodeId> {
    NAMES.iter().position(|name| *name == word).map(|at| NodeId(at as u16))
}

fn name(node: NodeId) -> &'static str {
    NAMES[node.index()]
}

fn settings(words: &[&str]) -> Settings {
    let has = |word: &str| words.contains(&word);
    let count = if has("two") {
        2
    } else if has("four") {
        4
    } else {
        3
    };
    let rule = |name: &&str| {
        let never = words.iter().position(|word| *word == "never").is_some_and(|at| words[at + 1] == *name);
        // `far c`: it is in another zone than the rest.
        let far = words.windows(2).any(|pair| pair[0] == "far" && pair[1] == *name);
        let zone = Some(if far { "there" } else { "here" }.to_owned());
        NodeRule { name: (*name).to_owned(), priority: if never { 0 } else { 100 }, zone }
    };
    Settings {
        mode: if has("manual") { Mode::Manual } else { Mode::Auto },
        durability: if has("quorum") { Durability::Quorum } else { Durability::Async },
        max_lost_bytes: 1000,
        allow_minority: has("minority"),
        sync_strict: has("strict"),
        ..Settings::of_nodes(NAMES.iter().take(count).map(rule).collect())
    }
}

struct Story {
    settings: Settings,
    machine: Machine,
    now: Now,
    disk: Record,
    record_fails: bool,
    orders: VecDeque<(OrderId, NodeId, Order)>,
    /// What it has wanted, and how far the story has told it.
    did: Vec<String>,
    told: usize,
    commands: u64,
}

impl Story {
    fn new(words: &[&str]) -> Story {
        let now = Now { at: Instant::now(), unix_ms: 0 };
        let settings = settings(words);
        let machine = Machine::new(settings.clone(), Record::default(), now);
        Story {
            settings,
            machine,
            now,
            disk: Record::default(),
            record_fails: false,
            orders: VecDeque::new(),
            did: Vec::new(),
            told: 0,
            commands: 0,
        }
    }

    /// All nodes have been well for a while.
    fn well(&mut self) {
        let (primary, timeline) = (NodeId(0), TimelineId(1));
        self.step(Event::Adopted { primary, timeline, epoch: Epoch(1), system_identifier: 7, forked: None });
        self.observe(primary, writer(1, 500, None, 1));
        for at in 1..self.settings.nodes.len() {
            self.observe(NodeId(at as u16), standby(1, 500, Some((primary, 7))));
        }
        self.wait(Duration::from_secs(20));
        self.did.clear();
    }

    fn observe(&mut self, node: NodeId, fact: Fact) {
        self.step(Event::Observed { node, fact });
    }

    fn wait(&mut self, time: Duration) {
        let tick = Duration::from_millis(100);
        let mut left = time;
        while !left.is_zero() {
            let by = left.min(tick);
            self.now.at += by;
            left -= by;
            self.step(Event::Tick);
        }
    }

    fn step(&mut self, event: Event) {
        let actions = self.machine.step(event, self.now);
        for action in actions {
            self.did.push(self.told_of(&action));
            match action {
                Action::Record(_) if self.record_fails => {
                    self.did.pop();
                    self.step(Event::RecordFailed("no space left on device".to_owned()));
                    return;
                }
                Action::Record(record) => self.disk = *record,
                Action::Order { id, node, order } => self.orders.push_back((id, node, order)),
                _ => {}
            }
        }
    }

    fn told_of(&self, action: &Action) -> String {
        match action {
            Action::Record(record) => match &record.intent {
                None => format!("record epoch {}", record.epoch.0),
                Some(intent) => {
                    let stage = match intent.stage {
                        Stage::Prepare => "prepare".to_owned(),
                        Stage::Promote(candidate) => format!("promote {}", name(candidate)),
                    };
                    format!("record {stage} epoch {}", intent.epoch.0)
                }
            },
            Action::Gate(gate) => format!("gate {gate:?}").to_lowercase(),
            Action::CloseSockets { epoch } => format!("close sockets of epoch {}", epoch.0),
            Action::Order { node, order, .. } => match order {
                Order::SetSync { members, .. } => {
                    let members: Vec<&str> = members.iter().map(|member| name(*member)).collect();
                    format!("order set_sync {} [{}]", name(*node), members.join(" "))
                }
                Order::Repoint { to, .. } => format!("order repoint {} to {}", name(*node), name(*to)),
                order => format!("order {} {}", order.label(), name(*node)),
            },
            Action::Probe(node) => format!("probe {}", name(*node)),
            Action::Publish(target) => {
                let loss = match target.loss.exact_bytes {
                    Some(exact) => format!("lost {exact}"),
                    None => format!("lost at least {}", target.loss.acked_bytes_min),
                };
                format!(
                    "publish {} epoch {} fork {} {loss}",
                    name(target.primary),
                    target.epoch.0,
                    target.fork.0
                )
            }
            Action::Enter(State::Blocked(why)) => format!("blocked {}", why.label()),
            Action::Enter(state) => state.label().to_owned(),
            Action::Reply { answer: Ok(text), .. } => format!("reply {text}"),
            Action::Reply { answer: Err(text), .. } => format!("refuse {text}"),
            Action::Alarm(alarm) => {
                let words = format!("{alarm:?}");
                format!("alarm {}", words.split(['(', ' ']).next().unwrap_or_default())
            }
        }
    }

    /// The oldest order of this kind to this node ends.
    fn ends(&mut self, label: &str, at: NodeId, words: &[&str]) -> Result<(), String> {
        let found = self.orders.iter().position(|(_, of, order)| *of == at && order.label() == label);
        let (id, ..) = found.and_then(|at| self.orders.remove(at)).ok_or("no such order has been given")?;
        let number = || words.get(1).and_then(|word| word.parse().ok()).map(Lsn);
        let at = || number().ok_or("which position?");
        let result = match (label, words[0]) {
            (_, "unknown") => OrderResult::Unknown("no answer".to_owned()),
            (_, "failed") => OrderResult::Failed("it was refused".to_owned()),
            ("kick", "streams") => OrderResult::Kicked(Kick::Streams),
            ("kick", "gone") => OrderResult::Kicked(Kick::Gone),
            ("kick", "same") => OrderResult::Kicked(Kick::SameProcess),
            ("sever", "done") => {
                let timeline = words.get(3).and_then(|word| word.parse().ok()).unwrap_or(1);
                OrderResult::Severed { end: at()?, timeline: Some(TimelineId(timeline)) }
            }
            ("fence", "done") => OrderResult::Fenced { end: at()? },
            ("barrier", "done") => OrderResult::Reached(at()?),
            ("promote", "done") => {
                let timeline = words.get(3).and_then(|word| word.parse().ok()).unwrap_or(2);
                OrderResult::Promoted { timeline: TimelineId(timeline), fork: at()? }
            }
            ("repoint", "diverged") => OrderResult::Diverged { at: at()? },
            (_, "done") => OrderResult::Done,
            _ => return Err("no such end".to_owned()),
        };
        self.step(Event::OrderDone { id, result });
        Ok(())
    }

    fn command(&mut self, command: Command) {
        self.commands += 1;
        self.step(Event::Command { id: CommandId(self.commands), command });
    }

    /// The proxy dies, and starts anew from what is on disk. Its orders' answers go to nobody.
    fn crash(&mut self) {
        self.orders.clear();
        self.now.at += Duration::from_millis(500);
        self.machine = Machine::new(self.settings.clone(), self.disk.clone(), self.now);
    }

    fn line(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            ">" => return self.expect(&words[1..].join(" ")),
            "!" => return self.expect_not(&words[1..].join(" ")),
            "state" => return equal(&words[1..].join(" "), &self.state()),
            "out" => return equal(&words[1..].join(" "), &self.out()),
            _ => {}
        }
        self.happens(&words)
    }

    fn happens(&mut self, words: &[&str]) -> Result<(), String> {
        let at = words.get(1).and_then(|word| node(word));
        let flag = |word: &str| words.contains(&word);
        let after = |word: &str| words.iter().position(|it| *it == word).and_then(|at| words.get(at + 1));
        match (words[0], at) {
            ("well", _) => self.well(),
            ("wait", _) => self.wait(duration(words[1])?),
            ("crash", _) => self.crash(),
            ("record", _) => self.record_fails = words[1] == "fails",
            ("sync", _) => {
                let members = words.iter().skip(3).filter_map(|word| node(word)).collect();
                let num = words[1].parse().unwrap_or(0);
                self.step(Event::Sync(SyncState { members, num, degraded: words[1] == "degraded" }));
            }
            ("sockets", _) => {
                let epoch = self.machine.record().epoch;
                self.step(Event::SocketsClosed { epoch });
            }
            ("drained", _) => self.step(Event::Drained),
            ("acknowledged", _) => {
                self.step(Event::Acknowledged(Lsn(words[1].parse().map_err(|_| "which position?")?)));
            }
            ("switchover", _) => {
                let to = after("to").and_then(|word| node(word));
                self.command(Command::Switchover { to, dry_run: flag("dry"), timeout: None });
            }
            ("failover", _) => {
                let to = after("to").and_then(|word| node(word));
                self.command(Command::Failover { to, allow_data_loss: flag("loss") });
            }
            ("pause", _) => self.command(Command::PauseFailover),
            ("resume", _) => self.command(Command::ResumeFailover),
            ("acknowledge", _) => self.command(Command::AckRecovery),
            ("forget", Some(at)) => self.command(Command::Forget(at)),
            (label, Some(at)) if words.len() > 2 && node(label).is_none() => {
                return self.ends(label, at, &words[2..]);
            }
            (word, _) => {
                let at = node(word).ok_or("no such word")?;
                let fact = fact(&words[1..]).ok_or("no such fact")?;
                self.observe(at, fact);
            }
        }
        Ok(())
    }

    fn state(&self) -> String {
        match self.machine.state() {
            State::Blocked(why) => format!("blocked {}", why.label()),
            state => state.label().to_owned(),
        }
    }

    fn out(&self) -> String {
        let out = self.machine.record().quarantined.iter();
        out.map(|(node, why)| format!("{} {}", name(*node), why.label())).collect::<Vec<_>>().join(", ")
    }

    /// It has wanted this, after what was told before it.
    fn expect(&mut self, wanted: &str) -> Result<(), String> {
        let found = self.did[self.told..].iter().position(|did| did.starts_with(wanted));
        let found = found.ok_or_else(|| {
            format!("it did: {:#?}, then stood at: {}", &self.did[self.told..], self.state())
        })?;
        self.told += found + 1;
        Ok(())
    }

    fn expect_not(&self, unwanted: &str) -> Result<(), String> {
        match self.did[self.told..].iter().find(|did| did.starts_with(unwanted)) {
            None => Ok(()),
            Some(_) => Err(format!("it did: {:#?}", &self.did[self.told..])),
        }
    }
}

fn equal(wanted: &str, is: &str) -> Result<(), String> {
    if wanted == is { Ok(()) } else { Err(format!("it is: {is}")) }
}

fn duration(word: &str) -> Result<Duration, String> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| "how long?".to_owned());
    match word.strip_suffix("ms") {
        Some(text) => number(text).map(Duration::from_millis),
        None => number(word.trim_end_matches('s')).map(Duration::from_secs),
    }
}

fn writer(timeline: u32, at: u64, fork: Option<u64>, start: u64) -> Fact {
    let role = Role::Primary { timeline: TimelineId(timeline), insert: Lsn(at), fork: fork.map(Lsn) };
    Fact::Answered(Seen { system_identifier: 7, start: Some(Arc::from(start.to_string())), role })
}

fn standby(timeline: u32, at: u64, from: Option<(NodeId, u32)>) -> Fact {
    let timeline = TimelineId(timeline);
    let walreceiver =
        from.map(|(from, pid)| Walreceiver { pid, streaming: true, timeline, from: Some(from) });
    let (receive, replay) = (walreceiver.map(|_| Lsn(at)), Some(Lsn(at)));
    Fact::Answered(Seen {
        system_identifier: 7,
        start: None,
        role: Role::Standby { timeline: Some(timeline), receive, replay, walreceiver },
    })
}

fn fact(words: &[&str]) -> Option<Fact> {
    let after = |word: &str| {
        let at = words.iter().position(|it| *it == word)?;
        words.get(at + 1)?.parse::<u64>().ok()
    };
    let timeline = after("on").unwrap_or(1) as u32;
    let fact = match words[0] {
        "refused" => Fact::Refused,
        "silent" => Fact::Silent,
        "broken" => Fact::Broken,
        "starting" => Fact::Starting,
        "stopping" => Fact::ShuttingDown,
        "refuses" => Fact::Alive(words[1..].join(" ")),
        "writes" => writer(timeline, after("writes")?, after("fork"), after("start").unwrap_or(1)),
        "alone" => standby(timeline, after("alone")?, None),
        "follows" => {
            let from = node(words.get(1)?)?;
            standby(timeline, words.get(2)?.parse().ok()?, Some((from, after("pid").unwrap_or(7) as u32)))
        }
        _ => return None,
    };
    match (fact, words.contains(&"foreign")) {
        (Fact::Answered(seen), true) => Some(Fact::Answered(Seen { system_identifier: 8, ..seen })),
        (fact, _) => Some(fact),
    }
}

#[test]
fn the_stories_go_as_they_are_told() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios/failover");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let (mut failures, mut stories) = (Vec::new(), 0);
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let (mut story, mut title, mut failed) = (Story::new(&[]), "", false);
        for (number, line) in text.lines().enumerate() {
            if let Some(next) = line.strip_prefix("== ") {
                (story, title, failed) = (Story::new(&[]), next, false);
                stories += 1;
                continue;
            }
            if failed || line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let result = match line.strip_prefix("with ") {
                Some(words) => {
                    story = Story::new(&words.split_whitespace().collect::<Vec<_>>());
                    Ok(())
                }
                None => story.line(line),
            };
            if let Err(why) = result {
                failed = true;
                let file = file.file_name().unwrap().to_string_lossy().into_owned();
                failures.push(format!("{file}:{}: {title}: `{line}`: {why}", number + 1));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(stories > 40, "{stories}");
}
